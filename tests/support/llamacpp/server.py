"""Serve a GGUF file by llama.cpp's own HTTP server until this process ends.

    python server.py MODEL.gguf PORT KEY CONTEXT_TOKENS

This module runs in the environment `llamacpp`, which has xllamacpp, and imports nothing else.
"""

import sys
import threading

import xllamacpp

path, port, key, context = sys.argv[1:]
settings = xllamacpp.CommonParams()
settings.model.path = path
settings.port = int(port)
settings.api_keys = [key]
settings.n_ctx = int(context)
settings.n_parallel = 2
settings.kv_unified = True
settings.n_gpu_layers = 0
settings.cpuparams.n_threads = 1
settings.warmup = False
settings.ui = False
settings.offline = True
server = xllamacpp.Server(settings)
print(f"listening at {server.listening_address}", flush=True)
threading.Event().wait()
