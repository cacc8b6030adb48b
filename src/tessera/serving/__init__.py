"""Serving: attention from a KV cache, its problem, operands, dispatch and plan. The public functions stand in serving/api.py.

Like `tessera` itself this imports neither CUDA nor Triton.
"""
