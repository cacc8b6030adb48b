export PYTHONPATH=src TESSERA_CACHE_DIR=.gpu-cache
timeout 60 python gpu_s2.py 16 2>&1 | tail -30
A="1 x 8k;1 x 32k;4 x 8k;4 x 32k;16 x 8k;16 x 32k;64 x 8k;16/2 heads, 1 x 131072;16/2 heads, 16 x 8192;16/2 heads, 64 x 2048;16/2 heads, 256 x 512;ragged 64 x 100..32k;1 x 512;4 x 512;16 x 8k pages of 256;16 x 8k pages of 64;16 x 8k pages of 16;16 x 8k pages of 8"
PEERS=1 TAG=new CELLS="$A" OPTS=auto,split,stream_k timeout 40 python gpu_tune.py 2>&1 | tail -24
TESSERA_SERVER_STEPS=1500 timeout 70 python -m pytest -q -n 8 -p no:cacheprovider tests/gpu/test_serving.py 2>&1 | tail -15
