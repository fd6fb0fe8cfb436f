"""Tests of mae_dist."""

# `jax.jit(…, compiler_options=QUICK)` compiles twice as fast, for what runs a few times on a few numbers.
QUICK: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}

NO_PARITY = "PyTorch and transformers are not installed: `bash tests/run.sh` without --no-parity installs them"
