"""What a step costs, measured: each file answers one question and runs by itself.

    make bench                        # everything, then docs/performance.md: 40 minutes on 2 cores
    make bench QUICK=1                # the same with a million parameters: 3 minutes, on the screen
    python -m benchmarks.step --help  # one question

- `step.py`: a step beside a forward pass of the same quantized model, for each storage, structure,
  number of tokens and of queries;
- `baselines.py`: a step beside the naive loop, MeZO, Adam, and the same arithmetic by hand;
- `scaling.py`: growth with parameters, 1 M to 135 M, and with queries, 1 to 64;
- `memory.py`: resident memory of whole processes, and temporary memory as a network grows;
- `dequantization.py`: the fastest way from codes to floats;
- `compiling.py`: what tracing and compiling a step takes, beside a forward pass;
- `beside.py`: a forward pass beside llama.cpp's, a step beside PyTorch's, whose processes are in
  `peers/`; not part of `make bench`, since it needs both;
- `device.py`, `exactness.py`: what only an accelerator can tell; `gpu.sh` runs both and more in
  under 8 minutes, and `gpu.sh --rehearse` does so with small shapes on a CPU;
- `formats.py`: a matrix in each format of files, beside Q4_1;
- `report.py`: docs/performance.md, from `tables.py` and `figures.py`.

Helpers: `models.py` is what is trained, `timing.py` the clock, `floor.py` the least a step can
cost, `results.py` writes numbers to `benchmarks/results/NAME_BACKEND.json`, with the machine and
the versions, and `measured.py` reads them. What is there is not measured again, so a run may be
stopped and resumed; `--fresh` starts over. The backend is JAX's: the same commands measure a GPU.
"""
