"""Continuous batching over a paged cache: requests join when a seat and pages are free, decode together, and leave when done.

    server = Server(model, Cache.empty(model, pages=200, page_size=16), seats=8)
    served = server.run(requests)

Whoever joins is prefilled in one packed call; all seats then decode in one call of fixed shapes, which on a GPU is captured
once as a CUDA graph and replayed while sequences come, grow and go: only the contents of tables and lengths change.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tessera.bench.llama import Appending, Cache, Cached, Llama, eager_logits
from tessera.bench.replay import replayable

_SPARE_PAGE = 0
"""Where empty seats write: a decoding step has one row for each seat, taken or not."""


@dataclass(frozen=True)
class Request:
    """A prompt that arrives before step `arrives`, to be continued by `new_tokens` tokens."""

    prompt: tuple[int, ...]
    new_tokens: int
    arrives: int = 0

    @property
    def rows(self) -> int:
        """Rows in the cache at the end (the last token is never fed back)."""
        return len(self.prompt) + self.new_tokens - 1


@dataclass(frozen=True)
class Ragged:
    """Random requests: how many, and the ranges of their prompts' lengths and continuations."""

    count: int
    prompt: tuple[int, int]
    new_tokens: tuple[int, int]

    def requests(self, vocabulary: int, seed: int = 0) -> tuple[Request, ...]:
        """The same for the same seed; one arrives every other step."""
        draw = random.Random(seed)
        made = []
        for index in range(self.count):
            prompt = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(*self.prompt)))
            made.append(Request(prompt, draw.randint(*self.new_tokens), 2 * index))
        return tuple(made)


@dataclass(eq=False)
class _Seated:
    """A request in its seat: its pages, the rows that it has in the cache, and what it has been answered."""

    number: int
    request: Request
    pages: list[int]
    rows: int = 0
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Served:
    """What a run did. `answers`: the new tokens of each request; `waited`: the steps that arrived requests waited, in all;
    `peak_pages` of `pages` were taken at once; `appending`: how rows got into the cache."""

    answers: tuple[tuple[int, ...], ...]
    steps: int
    prompt_tokens: int
    new_tokens: int
    most_seated: int
    waited: int
    peak_pages: int
    pages: int
    prefill_s: float
    decode_s: float
    appending: str


class Server:
    """A model, its cache, `seats` places in the decoding batch, and how rows get into the cache (None: as suits the device)."""

    def __init__(self, model: Llama, cache: Cache, seats: int, appending: Appending | None = None):
        self.model, self.cache, self.page_size = model, cache, cache.keys.shape[2]
        self.appending = appending or Appending.suited(model, self.page_size)
        self._free = list(range(cache.keys.shape[1] - 1, _SPARE_PAGE, -1))
        self._promised = 0  # pages that those seated will still ask for
        self._seats: list[_Seated | None] = [None] * seats
        most_pages = -(-model.shape.positions // self.page_size)
        device = model.device
        self._table = torch.full((seats, most_pages), _SPARE_PAGE, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(seats, dtype=torch.int32, device=device)
        self._taken = torch.zeros(seats, dtype=torch.int32, device=device)  # 1 where somebody sits, whose length grows
        self._tokens = torch.zeros(seats, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            self._decode = replayable(self._decode_step, device)

    @torch.no_grad()
    def run(self, requests: Sequence[Request]) -> Served:
        """Serve all requests, in the order in which they arrive. Raises ValueError for one that can never be seated."""
        for request in requests:
            self._check(request)
        waiting = deque(enumerate(requests))
        answers: dict[int, tuple[int, ...]] = {}
        seconds = {"prefill": 0.0, "decode": 0.0}
        steps = waited = most_seated = peak_pages = 0
        while waiting or any(self._seats):
            joining = []
            while waiting and waiting[0][1].arrives <= steps and self._has_room(waiting[0][1]):
                joining.append(self._seat(*waiting.popleft()))
            waited += sum(request.arrives <= steps for _, request in waiting)
            if joining:
                seconds["prefill"] += self._timed(partial(self._prefill, joining))
            most_seated = max(most_seated, sum(map(bool, self._seats)))
            peak_pages = max(peak_pages, self.cache.keys.shape[1] - 1 - len(self._free))
            self._dismiss(answers)
            if any(self._seats):
                seconds["decode"] += self._timed(self._advance)
            self._dismiss(answers)
            steps += 1
        ordered = tuple(answers[number] for number in range(len(requests)))
        return Served(
            ordered, steps, sum(len(r.prompt) for r in requests), sum(map(len, ordered)), most_seated, waited, peak_pages,
            self.cache.keys.shape[1] - 1, seconds["prefill"], seconds["decode"], self.appending.value,
        )  # fmt: skip

    def _check(self, request: Request) -> None:
        most = min(self.model.shape.positions, (self.cache.keys.shape[1] - 1) * self.page_size)
        if not request.prompt or request.new_tokens < 1 or request.rows > most:
            asked = f"{len(request.prompt)} + {request.new_tokens} tokens"
            raise ValueError(f"request={asked}: a prompt and an answer have a token at least, and {most} rows at most fit")

    def _pages_for(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def _has_room(self, request: Request) -> bool:
        """A free seat, and pages to the end: who has been seated never waits for another's pages."""
        return None in self._seats and self._pages_for(request.rows) <= len(self._free) - self._promised

    def _seat(self, number: int, request: Request) -> int:
        seat = self._seats.index(None)
        self._seats[seat] = _Seated(number, request, [])
        self._promised += self._pages_for(request.rows)
        return seat

    def _grow(self, seat: int, rows: int) -> None:
        """Give a seat the pages for so many rows."""
        seated = self._at(seat)
        while len(seated.pages) < self._pages_for(rows):
            page = self._free.pop()
            self._promised -= 1
            self._table[seat, len(seated.pages)] = page
            seated.pages.append(page)

    def _at(self, seat: int) -> _Seated:
        seated = self._seats[seat]
        if seated is None:
            raise LookupError(f"seat {seat} is free")
        return seated

    def _prefill(self, joining: Sequence[int]) -> None:
        """The prompts of all who join, in one packed call; the first token of each answer."""
        prompts = [self._at(seat).request.prompt for seat in joining]
        for seat, prompt in zip(joining, prompts, strict=True):
            self._grow(seat, len(prompt))
        device = self.model.device
        ends = torch.tensor([0, *(len(prompt) for prompt in prompts)], device=device).cumsum(0)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        seats = torch.tensor(joining, device=device)
        cached = Cached(self.model, self.cache, self.appending, self._lengths[seats], self._table[seats], ends.int())
        best = self.model.logits(self.model(tokens, cached.attend)[ends[1:] - 1]).argmax(-1)
        self._tokens[seats, 0] = best
        self._lengths[seats] = ends.diff().int()
        self._taken[seats] = 1
        for seat, prompt, token in zip(joining, prompts, best.tolist(), strict=True):
            seated = self._at(seat)
            seated.rows = len(prompt)
            seated.answer.append(token)

    def _advance(self) -> None:
        """One token for everyone."""
        taken = [seat for seat, seated in enumerate(self._seats) if seated is not None]
        for seat in taken:
            self._grow(seat, self._at(seat).rows + 1)
        self._decode()
        best = self._tokens[:, 0].tolist()
        for seat in taken:
            seated = self._at(seat)
            seated.rows += 1
            seated.answer.append(best[seat])

    def _decode_step(self) -> None:
        """Feed every seat its last token; the next one replaces it. Shapes and addresses never change."""
        cached = Cached(self.model, self.cache, self.appending, self._lengths, self._table)
        x = self.model(self._tokens, cached.attend)  # (seats, 1, hidden)
        self._tokens.copy_(self.model.logits(x).argmax(-1))
        self._lengths += self._taken

    def _dismiss(self, answers: dict[int, tuple[int, ...]]) -> None:
        """Whoever has the whole answer leaves; the pages are free for others, and hold what they held."""
        for seat, seated in enumerate(self._seats):
            if seated is not None and len(seated.answer) == seated.request.new_tokens:
                answers[seated.number] = tuple(seated.answer)
                self._promised -= self._pages_for(seated.request.rows) - len(seated.pages)
                self._free += reversed(seated.pages)
                self._table[seat] = _SPARE_PAGE
                self._lengths[seat] = self._taken[seat] = 0
                self._seats[seat] = None

    def _timed(self, work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Judged:
    """Answers beside eager attention's on the same tokens: `equal` are its own choice, `near` as good to its dtype's rounding.

    `exact` are the choice of the same weights in float32, `eager_exact` how often eager attention in our dtype makes that choice.
    """

    tokens: int
    equal: int
    near: int
    exact: int
    eager_exact: int

    @property
    def ok(self) -> bool:
        return self.tokens > 0 and self.equal + self.near == self.tokens


@torch.no_grad()
def judge(model: Llama, exact: Llama, requests: Sequence[Request], served: Served) -> Judged:
    """Whether greedy answers are eager attention's.

    Each is fed to the model again whole, without a cache: the answer is eager's own where every token is the best of the logits
    before it. Where one is not (two nearly equal ones, in 16 bits), it may fall short of the best of `exact`, the same weights in
    float32, by twice as much as eager's logits differ from those.
    """
    counts = [0] * 5
    for request, answer in zip(requests, served.answers, strict=True):
        whole = torch.tensor([*request.prompt, *answer], device=model.device)
        before = len(request.prompt) - 1
        eager, right = (eager_logits(each, whole[:-1])[before:] for each in (model, exact))  # (new tokens, vocabulary)
        chosen, best = whole[before + 1 :], right.argmax(-1)
        same = eager.argmax(-1) == chosen
        short = right.amax(-1) - right.gather(-1, chosen[:, None])[:, 0]
        near = ~same & (short <= 2 * (eager - right).abs().amax(-1))
        found = (torch.ones_like(same), same, near, chosen == best, eager.argmax(-1) == best)
        counts = [count + int(mask.sum()) for count, mask in zip(counts, found, strict=True)]
    return Judged(*counts)
