"""The words of the page, in English and Chinese."""

import html
from typing import Any

LANGUAGES = {"en": "English", "zh": "中文"}

# Key → English, Chinese. ``control.<key of args>`` is the label of a control, ``hint.<key>`` what is said below it.
WORDS: dict[str, tuple[str, str]] = {
    "language": ("Language", "语言"),
    "tab.sample": ("Sample", "生成"),
    "tab.history": ("History", "历史"),
    "tab.training": ("Training", "训练"),
    "model": ("Model", "模型"),
    "model.missing": (" (weights missing)", "（缺少权重）"),
    "lora": ("LoRA adapter", "LoRA 权重"),
    "lora.says": ("Several can be added, one a row.", "可添加多个，每行一个。"),
    "lora.none": ("none", "无"),
    "control.strength": ("Strength", "强度"),
    "load": ("Trained weights instead of the model's", "用训练得到的权重代替模型权重"),
    "load.none": ("none: the model's own weights", "无：使用模型自带权重"),
    "preview": ("Preview while sampling", "采样时预览"),
    "preview.says": (
        "Frames of the start, the middle and the end; results stay the same.",
        "显示开头、中间和结尾的画面；不影响结果。",
    ),
    "preview.alt": ("Preview: frames of the start, the middle and the end", "预览：开头、中间和结尾的画面"),
    "memory": ("Memory preset", "显存预设"),
    "memory.auto": ("automatic: what fits into free memory", "自动：按空闲显存选择"),
    "speed": ("Speed preset", "速度预设"),
    "preset.none": ("none", "无"),
    "image": ("Choose the first frame", "选择首帧图片"),
    "prompt.none": ("The prompt is empty: write what the video shows.", "提示词为空：请写明视频的内容。"),
    "image.none": ("This model needs an image: it becomes the first frame.", "此模型需要一张图片作为首帧。"),
    "more": ("More settings", "更多设置"),
    "compare": ("Compare", "对比"),
    "compare.says": (
        "A second video of the same prompt and seed, with these settings changed. What is left empty stays as above.",
        "用相同的提示词和种子再生成一个视频，只改变以下设置；留空则与上方相同。",
    ),
    "compare.strength": (
        "A strength is given to compare, and no LoRA that it could be of: choose one.",
        "对比中填写了强度，但没有可用的 LoRA：请选择一个。",
    ),
    "compare.same": ("as above", "与上方相同"),
    "run": ("Sample", "生成"),
    "run.both": ("Sample both", "生成两个并对比"),
    "cancel": ("Cancel", "取消"),
    "video": ("Video", "视频"),
    "video.second": ("With the changed settings", "改变后的设置"),
    "log": ("Messages of the command", "命令输出"),
    "control.prompt": ("Prompt", "提示词"),
    "control.negative_prompt": ("Negative prompt", "负面提示词"),
    "control.sampling_image_size": ("Size", "尺寸"),
    "first.sampling_image_size": ("Height", "高度"),
    "second.sampling_image_size": ("Width", "宽度"),
    "control.sampling_num_frames": ("Latent frames", "latent 帧数"),
    "control.num_steps": ("Steps", "采样步数"),
    "control.guidance_scale": ("Guidance scale", "引导强度（guidance scale）"),
    "control.seed": ("Seed", "随机种子"),
    "control.guidance_interval": ("Guidance interval", "引导区间"),
    "first.guidance_interval": ("Guidance from", "引导起点"),
    "second.guidance_interval": ("Guidance to", "引导终点"),
    "control.time_scaling": ("Positions of longer clips", "更长视频的位置编码（time scaling）"),
    "control.time_window": ("Window along time, in latent frames", "时间窗口（latent 帧数）"),
    "control.time_window_overlap": ("Overlap of windows", "窗口重叠"),
    "control.loop": ("Seamless loop", "无缝循环"),
    "control.step_cache": ("Step cache", "步间缓存（step cache）"),
    "control.step_cache_threshold": ("Threshold of the step cache", "步间缓存阈值"),
    "control.weights": ("Weights of the network in fewer bits", "网络权重量化"),
    "control.text_encoder_weights": ("Weights of T5 in fewer bits", "T5 权重量化"),
    "control.attention": ("Attention kernel", "注意力算子"),
    "control.vae_tiling": ("Decode in tiles", "分块解码（VAE tiling）"),
    "control.compile": ("Compile the network", "编译网络（compile）"),
    "control.allow_unknown_text": ("Allow text that T5 does not know", "允许 T5 不认识的文字"),
    "hint.prompt": (
        "English, like the captions that the model was trained on, here with an example: a released model wants a long "
        "paragraph that describes what is seen.",
        "英文，写法与训练用的视频描述（caption）相同，已填入一个示例；正式发布的模型需要一段较长的画面描述。",
    ),
    "hint.negative_prompt": ("What the video should not show.", "不希望出现的内容。"),
    "length": ("{frames} frames, {seconds} s", "{frames} 帧，{seconds} 秒"),
    "hint.guidance_interval": (
        "Shares of the steps; outside of them there is no guidance.",
        "按步数比例计；区间之外不使用引导。",
    ),
    "hint.time_scaling": ("For clips longer than those of training.", "用于比训练时更长的视频。"),
    "hint.time_window": (
        "Longer clips are denoised in overlapping windows of so many.",
        "更长的视频按此长度分成相互重叠的窗口去噪。",
    ),
    "hint.loop": ("The last frame leads into the first.", "最后一帧与第一帧相接。"),
    "hint.step_cache": ("Faster, approximate.", "更快，结果为近似。"),
    "hint.weights": ("Less memory; results change a little.", "省显存；结果略有变化。"),
    "hint.vae_tiling": ("Less memory; seams may differ slightly.", "省显存；接缝处可能略有差异。"),
    "range": ("From {least} to {most}.", "{least} 到 {most}。"),
    "empty": ("as in the model's file", "同模型文件"),
    "state.waiting": ("Waiting: {ahead} before this one", "排队中：前面还有 {ahead} 个"),
    "state.starting": ("Starting, checking the settings", "正在启动并检查设置"),
    "state.text": ("Reading the prompt", "正在编码提示词"),
    "state.loading": ("Reading the weights", "正在读取权重"),
    "state.steps": ("Step {done} of {total}", "第 {done} 步，共 {total} 步"),
    "state.decoding": ("Decoding the video", "正在解码视频"),
    "state.done": ("Done: {path}", "完成：{path}"),
    "state.cancelled": ("Cancelled.", "已取消。"),
    "state.nothing": ("There is nothing to cancel.", "没有可取消的任务。"),
    "state.failed": (
        "This cannot be done as it is set. The program says:",
        "当前设置无法执行。程序提示（英文；常见的见 docs/zh/troubleshooting.md）：",
    ),
    "state.broken": (
        "The run failed. The program says:",
        "运行失败。程序提示（英文；常见的见 docs/zh/troubleshooting.md）：",
    ),
    "state.of": ("{part} of {parts}", "第 {part} 个，共 {parts} 个"),
    "history.choose": ("Finished videos, the newest first", "已完成的视频，最新在前"),
    "history.refresh": ("Refresh", "刷新"),
    "history.reuse": ("Use these settings again", "再次使用这些设置"),
    "history.settings": ("Settings", "设置"),
    "history.none": ("There is no finished video yet.", "还没有完成的视频。"),
    "history.used": ("The settings are in the tab Sample.", "设置已填入“生成”页。"),
    "history.enhanced": (
        "The prompt is the one that a language model wrote from: {original}.",
        "提示词是语言模型根据以下内容改写的：{original}。",
    ),
    "history.beyond": (
        "The page has no control for these, and a new video is made without them: {settings}.",
        "以下设置在本页没有对应选项，重新生成时不会使用：{settings}。",
    ),
    "history.model": (
        "Its model file is not among those of this page; the chosen model stays.",
        "其模型文件不在本页可选范围内，模型保持不变。",
    ),
    "history.image": ("Its image is gone: choose it again.", "图片已不存在：请重新选择。"),
    "history.loras": (
        "Its LoRAs are more, or set in another way, than the page can show: choose them again.",
        "其 LoRA 的数量或设置方式超出本页可显示的范围：请重新选择。",
    ),
    "train.model": ("Model file; those that end in _lora train adapters", "模型文件；以 _lora 结尾的训练 LoRA"),
    "train.recipe": ("Training preset", "训练预设"),
    "train.data": ("Data folder", "数据目录"),
    "train.check": ("Check", "检查"),
    "train.says": ("What --check says", "--check 的结果"),
    "train.command": ("The command, to copy into a terminal", "命令，可复制到终端运行"),
    "train.run": ("Run folder", "运行目录"),
    "train.refresh": ("Look again", "刷新"),
    "train.curve": ("Loss, smoothed", "loss（平滑后）"),
    "train.quarter.0": ("Timesteps 0-249 (least noise)", "timestep 0-249（噪声最少）"),
    "train.quarter.1": ("Timesteps 250-499", "timestep 250-499 段"),
    "train.quarter.2": ("Timesteps 500-749", "timestep 500-749 段"),
    "train.quarter.3": ("Timesteps 750-999 (most noise)", "timestep 750-999（噪声最多）"),
    "train.samples": ("Samples at evaluations, the newest first", "评估时的样本，最新在前"),
    "train.sample": ("iteration {iteration}: {caption}", "第 {iteration} 步：{caption}"),
    "train.state": ("Iteration {iteration}, loss {loss}", "第 {iteration} 步，loss {loss}"),
    "train.none": ("There is no run yet: start the command above.", "还没有运行：请先执行上面的命令。"),
    "train.no_data": (
        "No data folder was given: start the page with --data FOLDER.",
        "没有给出数据目录：启动页面时请加 --data FOLDER。",
    ),
    "training": ("training", "训练"),
    "validation": ("validation", "验证"),
}


def say(language: str, key: str, **values: Any) -> str:
    """Return the words of a key in a language, its ``{names}`` replaced."""
    words = WORDS[key][1 if language == "zh" else 0]
    return words.format(**values) if values else words


def has(key: str) -> bool:
    """Whether there are words for a key."""
    return key in WORDS


def as_html(text: str) -> str:
    """Return text for a place where the page takes HTML: nothing in it is markup."""
    return html.escape(text, quote=True)
