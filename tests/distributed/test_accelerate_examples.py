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

from spiel_peft import SpIELLayer

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# Runs a script with Accelerate on CPUs, FSDP included.
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
    assert config.num_processes == 8
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


def launch(config: str, folder: Path) -> dict[str, torch.Tensor]:
    """Run the example on two processes without GPUs; returns the tensors that it saved."""
    script, adapter = folder / "on_cpu.py", folder / config.removesuffix(".yaml")
    script.write_text(ON_CPU.format(script=str(FOLDER / "train.py")))
    command = ["--config_file", FOLDER / config, "--num_processes", 2, "--mixed_precision", "no"]
    command += ["--main_process_port", 0, script]
    given = ["--model", folder / "model", "--text", folder / "text", "--output", adapter]
    given += ["--steps", 14, "--tokens", 8, "--r", 2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, command), *map(str, given)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 10: loss") == 1
    assert done.stdout.count("DistributedType.FSDP" if config == "fsdp2.yaml" else "DistributedType.MULTI_CPU") == 2
    return load_file(adapter / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_script_trains_the_same_adapter_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[place] for place in torch.randint(0, len(WORDS), (600,), generator=generator).tolist()]
    (tmp_path / "text").write_text(" ".join(words))
    by_ddp, by_fsdp2 = launch("ddp.yaml", tmp_path), launch("fsdp2.yaml", tmp_path)
    assert by_ddp.keys() == by_fsdp2.keys()
    for key, tensor in by_ddp.items():
        torch.testing.assert_close(tensor, by_fsdp2[key], msg=key)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained = PeftModel.from_pretrained(base, tmp_path / "fsdp2")
    deltas = [layer.spiel_delta["default"] for layer in trained.modules() if isinstance(layer, SpIELLayer)]
    assert len(deltas) == 14 and all(bool(delta.values.any()) for delta in deltas)
