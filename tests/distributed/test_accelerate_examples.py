"""examples/accelerate: its config files say what Accelerate understands, and its script runs under them."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spiel_peft import SparseDelta, SpIELLayer

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# Runs a script with Accelerate's FSDP on CPUs.
ON_CPU = """
import os, runpy
os.environ["ACCELERATE_USE_CPU"] = "true"
from distributed.fsdp_on_cpu import allow_fsdp_on_cpu
allow_fsdp_on_cpu()
runpy.run_path({script!r}, run_name="__main__")
from accelerate.state import AcceleratorState
print(repr(AcceleratorState().distributed_type))
"""
WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's plugins write to the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def launch_arguments(name: str, *more: str) -> Namespace:
    parser = launch_command_parser()
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(FOLDER / name), *more, "train.py"]))
    return args


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))
    assert config.num_processes in (2, 8)
    assert launch_arguments(name, "--num_processes", "2").use_fsdp == name.startswith("fsdp2")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("fsdp2")])
def test_the_plugin_is_what_the_file_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepare_multi_gpu_env(launch_arguments(name, "--num_processes", "2"))
    for variable in [key for key in environment if key.startswith("FSDP_")]:
        monkeypatch.setenv(variable, environment[variable])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.activation_checkpointing and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading == (name == "fsdp2.yaml")
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def launch(config: str, script: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Run a script on two processes; what it has saved."""
    adapter = folder / config.removesuffix(".yaml")
    command = ["accelerate.commands.launch", "--config_file", str(FOLDER / config), "--num_processes", "2"]
    given: list[object] = ["--model", folder / "model", "--text", folder / "text", "--output", adapter]
    given += ["--steps", 14, "--tokens", 8, "--r", 2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", *command, "--main_process_port", "0", *more, str(script), *map(str, given)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 10: loss" in done.stdout
    assert ("DistributedType.FSDP" in done.stdout) == config.startswith("fsdp2")
    return load_file(adapter / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu.yaml", "fsdp2.yaml"])
def test_the_script_runs_under(config: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[place] for place in torch.randint(0, len(WORDS), (600,), generator=generator).tolist()]
    (tmp_path / "text").write_text(" ".join(words))
    script, more = FOLDER / "train.py", []
    if config.startswith("fsdp2"):
        script, more = tmp_path / "on_cpu.py", ["--mixed_precision", "no"]
        script.write_text(ON_CPU.format(script=str(FOLDER / "train.py")))
    saved = launch(config, script, tmp_path, *more)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained = PeftModel.from_pretrained(base, tmp_path / config.removesuffix(".yaml"))
    deltas = [layer.spiel_delta["default"] for layer in trained.modules() if isinstance(layer, SpIELLayer)]
    assert len(deltas) == 14
    assert all(bool(delta.values.any()) and 14 in saved[progress_of(delta)] for delta in deltas)
    assert len([key for key in saved if key.endswith(".values")]) == len(deltas)


def progress_of(delta: SparseDelta) -> str:
    """The key of what the file says of a delta's run; its first entry counts steps."""
    return f"base_model.model.{delta.module_name}.spiel_delta.spiel_progress"
