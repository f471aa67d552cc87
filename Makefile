# `make demo` and `make test` do their own set-up in .venv, once. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
INTERPRETERS ?= python3.11 python3.12
VENV := .venv
BIN := $(VENV)/bin
# pip compiles what it has installed in one process, which takes most of its time; here all cores do.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
# Some packages hold a file for another version of Python, which does not compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: demo web test test-all test-interpreters lint bench bench-gpu memory clean

# gradio and what only it needs. All is pinned, so nothing is left to resolve; its own bound on pillow is below the
# pillow of constraints.txt, with which it works.
WEB := gradio gradio-client hf-gradio groovy safehttpx brotli fastapi starlette uvicorn orjson pydub python-multipart \
	pytz semantic-version tomlkit

TOY = --base configs/toy.yaml configs/toy_inference.yaml
PROMPTS = args.input_file=outputs/land/clips/prompts.txt
TRAINED = $$(dirname "$$(ls -t outputs/land/runs/land-*/latest | head -n 1)")

# `beside LOG COMMAND` starts a command in the background, and `joined` ends with its code too and shows its output if it
# failed. Both sides have one thread: the toy gains little from a second one, and threads that wait for each other's cores
# lose much. A line for the terminal goes to 3.
BESIDE = export OMP_NUM_THREADS=1; exec 3>&1; mkdir -p outputs; \
	beside() { log=$$1; shift; "$$@" >$$log 2>&1 & pid=$$!; trap 'kill $$pid' INT TERM; }; \
	joined() { code=$$?; wait $$pid || { cat $$log >&2; exit 1; }; exit $$code; };

# What a step of the demo does, in the place of its command.
SAY := @printf '\n== %s\n'

demo: $(VENV)/installed  ## sample the toy models, teach one of them something new, sample it again, take it to diffusers
	@rm -rf outputs/land
	$(SAY) "1 of 4: making 78 clips, 48 of them with something that the toy does not know: green land"
	@$(BIN)/python tools/toy/concept.py make outputs/land/clips
	$(SAY) "2 of 4: training a LoRA on them, 300 iterations, while the toy models sample ten clips, six from text and four from an image"
	@$(BESIDE) \
		toy() { \
			bash inference.sh configs/toy.yaml configs/toy_inference.yaml && \
			bash inference.sh configs/toy_i2v.yaml configs/toy_inference.yaml args.output_dir=outputs/toy_i2v && \
			$(BIN)/python tools/contact_sheet.py outputs/toy outputs/toy_i2v --out outputs/demo.png && \
			printf '\noutputs/demo.png shows the ten clips\n' >&3 && \
			$(BIN)/python sample_video.py $(TOY) $(PROMPTS) args.output_dir=outputs/land/strength_0; }; \
		beside outputs/demo_toy.log toy; \
		bash finetune_single_gpu.sh configs/toy_lora.yaml configs/toy_sft.yaml configs/toy_land.yaml; joined
	$(SAY) "3 of 4: sampling five prompts with the LoRA at strengths 1 and 0.5, while model and LoRA are converted to diffusers"
	@$(BESIDE) \
		diffusers() { \
			$(BIN)/python tools/export_sat_lora_weight.py --sat_pt_path $(TRAINED) --lora_save_directory outputs/land/lora && \
			$(BIN)/python tools/convert_weight_sat2hf.py --base configs/toy.yaml --transformer_ckpt_path $(TRAINED) \
				--lora keep --dtype fp32 --verify --output_path outputs/land/diffusers && \
			$(BIN)/python tools/load_cogvideox_lora.py --model_path outputs/land/diffusers --lora_path outputs/land/lora \
				--prompt "$$(head -n 1 outputs/land/clips/prompts.txt)" --guidance_scale 2 --num_inference_steps 30 \
				--dtype fp32 --output_path outputs/land/diffusers.mp4; }; \
		at() { $(BIN)/python sample_video.py $(TOY) configs/toy_loras.yaml $(PROMPTS) args.loras.0.path=$(TRAINED) \
			args.loras.0.strength=$$1 args.output_dir=outputs/land/strength_$$1; }; \
		beside outputs/demo_diffusers.log diffusers; \
		at 1 && at 0.5; joined
	$(SAY) "4 of 4: comparing our network and LoRA with those of diffusers, and clips with and without the LoRA"
	@grep -v "it/s\]" outputs/demo_diffusers.log  # progress bars
	@$(BIN)/python tools/toy/concept.py measure outputs/land/strength_0 outputs/land/strength_1
	@$(BIN)/python tools/contact_sheet.py outputs/land/strength_0 outputs/land/strength_0.5 outputs/land/strength_1 \
		--beside --columns 4 --out outputs/demo_lora.png
	@echo "Open outputs/demo.png (the toy models), outputs/demo_lora.png (the LoRA at strengths 0, 0.5 and 1) and" \
		"outputs/land/diffusers.mp4 (with diffusers)."

web: $(VENV)/installed-web  ## serve a page for the browser, on this machine alone
	$(BIN)/python tools/web.py --data assets/toy

test: $(VENV)/installed-dev  ## run the tests
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-dev  ## run also those marked thorough: more ranks, model families, formats and options
	$(BIN)/python -m pytest -m "not slow"

test-interpreters:  ## install the wheel for every interpreter that is there, and run a short part of it; by hand, gigabytes
	for python in $(INTERPRETERS); do bash tests/interpreter.sh "$$python" || exit; done

lint: $(VENV)/installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck *.sh scripts/*.sh

bench: $(VENV)/installed-dev  ## print the figures of docs/benchmarks.md that a CPU has
	$(BIN)/python -m benchmarks

bench-gpu: $(VENV)/installed-dev  ## time and measure the released sizes on an accelerator, beside diffusers; goes on where it was cut off
	$(BIN)/python -m benchmarks.gpu

memory: $(VENV)/installed-dev  ## measure peak memory at released sizes, without an accelerator
	$(BIN)/python -m benchmarks.memory

clean:  ## remove what `make` has installed, and the demo's results; those of other runs stay
	rm -rf $(VENV) *.egg-info outputs/demo* outputs/land outputs/toy outputs/toy_i2v

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11" if not (3, 11) <= sys.version_info[:2] < (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[diffusers]'
	$(COMPILE)
	touch $@

$(VENV)/installed-dev: setup.py constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev,diffusers,scenes,wandb]'
	$(INSTALL) --no-deps $(WEB)
	$(COMPILE)
	touch $(VENV)/installed $(VENV)/installed-web $@

$(VENV)/installed-web: setup.py constraints.txt | $(VENV)/installed
	$(INSTALL) --no-deps $(WEB)
	$(COMPILE)
	touch $@
