# Each target is one call of scripts/bootstrap, which also works where make is missing.
# ARGS are handed on: make test ARGS="tests/unit -k journal"
ARGS =

.PHONY: help demo test check bench reliability chaos gpu lock protos fresh
help:
	@sh scripts/bootstrap help

demo test check bench reliability lock:
	@sh scripts/bootstrap $@ $(ARGS)

# Real processes, real signals: the tests that kill things. Random faults for minutes:
# make chaos ARGS="-m soak" (PHALANX_SOAK_S=600 for ten of them, PHALANX_SOAK_SEED=7 for the same faults again)
# make chaos ARGS=--stores=postgres+s3: the same tests, storage on a real PostgreSQL and S3 server
chaos:
	@sh scripts/bootstrap test tests/chaos $(ARGS)

# On a machine with an NVIDIA GPU: what only such a machine can tell of PyTorch modules. Installs PyTorch beside
# the tools for tests. Without a GPU it fails; `make test` skips these tests then.
gpu:
	@sh scripts/bootstrap prepare test
	@.venv-test/bin/python -m pip install -q --only-binary :all: "$$(sed -n 's/^torch = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@PHALANX_TEST_GPU=1 sh scripts/bootstrap test -n 0 tests/unit/numerics/test_torch_gpu.py \
		tests/unit/numerics/test_torch_device.py tests/unit/numerics/test_torch_module.py tests/system/test_torch.py $(ARGS)

# Generates the checked-in stubs in phalanx/v1 from protos/.
protos:
	@sh scripts/bootstrap prepare test
	@PYTHON=$(CURDIR)/.venv-test/bin/python sh scripts/gen_protos.sh

# Tries `make demo` on a fresh machine: a new Debian in a folder (needs root and debootstrap).
fresh:
	@sh scripts/try_fresh_machine $(ARGS)
