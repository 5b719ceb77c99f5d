# make demo    a picture-book scene, segmented by the embedded model
# make test    the quick tests; make test-all: the slow ones too; make test-browser: the widgets in Chromium
# make test-gpu: a GPU against the CPU, and its speed; make test-machines: this machine acts as others; make lint: style
# make notebooks: all notebooks, quick, their figures compared with the recorded ones; make notebooks-full: as committed
# make book: the README and the notebooks as a site, build/book/index.html, with a search; nothing is run or downloaded
# make embedded: trains the dense CLIP's models in data/ again; make study: the plain CLIP's, with the study;
# make ablation: the dense CLIP's table of data/README.md
PYTHON ?= python3
SIDE_BY_SIDE = -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-browser test-gpu test-machines lint notebooks notebooks-full book embedded study ablation

demo: .venv/.installed
	.venv/bin/sptseg demo

test: .venv/.installed
	.venv/bin/python -m pytest $(SIDE_BY_SIDE)

test-all: .venv/.installed
	.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m "not browser and not gpu"

test-browser: .venv/.installed
	.venv/bin/python -m pytest -m browser

test-gpu: export SPTSEG_TEST_DEVICE ?= cuda
test-gpu: .venv/.installed
	.venv/bin/python -m pytest -q -m gpu -rs tests/gpu || test $$? -eq 5 # 5: nothing ran, as there is no GPU

test-machines: .venv/.installed
	.venv/bin/python tests/machines.py

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

notebooks: .venv/.installed
	.venv/bin/sptseg notebooks check --jobs 2

notebooks-full: .venv/.installed
	.venv/bin/sptseg notebooks run --save --jobs 2

book: .venv/.installed
	.venv/bin/python -m sphinx -q -W --keep-going -c book -d build/book-pages . build/book
	@echo "The book is build/book/index.html."

embedded: .venv/.installed
	test -f data/tiny_clip.safetensors || .venv/bin/sptseg pretrain --output data/tiny_clip.safetensors
	.venv/bin/sptseg ablate --output runs/embedded --seeds 0 --configurations spt,zegclip
	.venv/bin/python -c "import sptseg; [sptseg.save_model(sptseg.load_model(f'runs/embedded/{run}-seed0'), \
	    f'data/{file}.safetensors', half=True) for run, file in [('spt', 'spt_seg'), ('zegclip', 'zegclip')]]"

study: .venv/.installed
	test -f data/tiny_clip_plain.safetensors || \
	    .venv/bin/sptseg pretrain --no-dense-losses --output data/tiny_clip_plain.safetensors
	.venv/bin/sptseg ablate --plan data/study.json --output runs/study
	cp runs/study/record.json data/study_record.json
	.venv/bin/python -c "import sptseg; place = 'runs/study/tiny-plain/scenes/{}/500-steps-seed-0'; \
	    [sptseg.save_model(model := sptseg.load_model(place.format(run)), f'data/plain_{file}.safetensors', model.about, \
	    half=True) for run, file in [('ours-naclip', 'naclip'), ('spt', 'released'), ('zegclip', 'zegclip')]]"

ablation: .venv/.installed
	.venv/bin/sptseg ablate --output runs/ablation

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "sptseg needs Python 3.11 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing sptseg and what it needs into .venv; the download takes some minutes."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@
