"""The rivals' programs: what they print, GGUF files, and that each computes what transformers does.

The tests of a rival whose packages are not installed are skipped; that its absence is told is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.bench.cage import forget
from common.bench.rivals import accelerate, gguf, llama_cpp, plain, program
from common.bench.rivals.program import (
    ABSENT,
    Options,
    Packages,
    Result,
    Timed,
    command,
    read_result,
    time_decoding,
)
from common.bench.rivals.transformers_model import keep_in_memory
from common.errors import StoreError, UserError
from tests.checkpoints import VARIANTS, Variant, make_checkpoint, make_config, random_model

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [5, 17, 99, 250, 31]
TOKENS = 6


def needs(packages: Packages) -> pytest.MarkDecorator:
    reason = program.absent(packages)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def save(folder: Path, config: dict[str, Any], family: str = "llama") -> Path:
    """A float16 checkpoint with overrides of the family's small configuration."""
    model: Any = random_model(make_config(Variant(family, config)), seed=3)
    model.to(torch.float16)
    model.config.dtype = torch.float16
    model.save_pretrained(folder, max_shard_size="150KB")
    return folder


def _decoded(path: Path, copies: bool) -> Any:
    """llama.cpp's logits after PROMPT, in a process that it may crash."""
    how = {"context": 8, "prompt": len(PROMPT), "threads": 1, "copies": copies}
    with llama_cpp.opened(path, "mmap", **how) as opened:
        return opened.decode(PROMPT).copy()


def reference(folder: Path, tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    out = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=tokens + 1, do_sample=False, eos_token_id=-1
    )
    return [int(token) for token in out[0, len(PROMPT) :]]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


def options(model: Path, **own: object) -> Options:
    namespace = argparse.Namespace(**own)
    return Options(model, PROMPT, TOKENS, torch.get_num_threads(), namespace)


def run_program(rival: str, tmp_path: Path, *arguments: str | Path | int) -> dict[str, Any]:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(PROMPT))
    shared = ("--tokens", TOKENS, "--prompt-ids-file", prompt, "--threads", 1)
    process = subprocess.run(
        command(rival, *arguments, *shared), cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    result = read_result(process.stdout)
    assert result is not None
    return result


class TestProgram:
    def arguments(self, tmp_path: Path, text: str) -> list[str]:
        prompt = tmp_path / "prompt.json"
        prompt.write_text(text)
        return ["model", "--tokens", "2", "--prompt-ids-file", str(prompt)]

    def contend(self, options: Options) -> Result:
        timed = Timed(1.5, [2.0], None, 0, options.prompt)
        return Result("rival", "1.0", 3.5, timed, "a note")

    def test_a_result_is_one_line_that_can_be_read_back(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert program.main(self.contend, {}, self.arguments(tmp_path, "[7, 8]")) == 0
        assert read_result("a library's words\n" + capsys.readouterr().out) == {
            "name": "rival",
            "version": "1.0",
            "load_ms": 3.5,
            "prefill_ms": 1.5,
            "ms_per_token": [2.0],
            "bytes_read": None,
            "major_faults": 0,
            "tokens": [7, 8],
            "note": "a note",
        }

    def test_an_absent_package_is_told_with_its_own_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        packages = {"json": "json", "no_such_module": "no-such-package"}
        assert program.main(self.contend, packages, self.arguments(tmp_path, "[7]")) == ABSENT
        assert read_result(capsys.readouterr().out) == {
            "absent": "no-such-package is not installed: pip install no-such-package"
        }

    @pytest.mark.parametrize("text", ["", "{}", "[]", "[1, 2.5]", "[true]", '["a"]'])
    def test_a_prompt_that_is_no_list_of_ids_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        assert program.main(self.contend, {}, self.arguments(tmp_path, text)) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "prompt.json" in captured.err

    @pytest.mark.parametrize("stdout", ["", "killed", "[1]"])
    def test_a_program_that_printed_no_result_is_seen(self, stdout: str) -> None:
        assert read_result(stdout) is None

    def test_each_token_is_timed_and_the_prompt_apart(self, tmp_path: Path) -> None:
        seen: list[list[int]] = []

        def step(ids: list[int]) -> int:
            seen.append(ids)
            time.sleep(0.02 if len(seen) == 3 else 0)
            return 100 + len(seen)

        timed = time_decoding(step, dataclasses.replace(options(tmp_path), tokens=3))
        assert seen == [PROMPT, [101], [102], [103]]
        assert timed.tokens == [101, 102, 103, 104]
        assert len(timed.ms_per_token) == 3
        assert timed.ms_per_token[1] >= 20, "the third step slept"

    def test_bytes_read_are_those_of_decoding(self, tmp_path: Path) -> None:
        if program._bytes_read() is None:
            pytest.skip("this system does not count them")
        path = tmp_path / "weights"
        path.write_bytes(bytes(3 << 20))

        def step(ids: list[int]) -> int:
            forget([path])
            path.read_bytes()
            return 1

        if forget([path]):
            pytest.skip("this file system keeps its files in memory")
        timed = time_decoding(step, dataclasses.replace(options(tmp_path), tokens=2))
        assert timed.bytes_read is not None
        assert 2 * (3 << 20) <= timed.bytes_read < 3 * (3 << 20)


@pytest.mark.parametrize("module", [accelerate, llama_cpp, plain, gguf])
def test_a_rival_names_packages_that_pip_knows_by_module(module: Any) -> None:
    missing = [name for name in module.PACKAGES if importlib.util.find_spec(name) is None]
    assert (program.absent(module.PACKAGES) is None) == (not missing)


class TestPlain:
    @pytest.mark.parametrize("variant", ["opt", "llama-gqa"])
    def test_it_decodes_what_transformers_generates(self, tmp_path: Path, variant: str) -> None:
        folder = make_checkpoint(tmp_path / "model", variant, "float16", sharded=True)
        result = plain.contend(options(folder, dtype="float16"))
        assert result.timed.tokens == reference(folder, TOKENS)
        size = sum(parameter.nbytes for parameter in load(folder).parameters())
        assert f"{size:,} bytes of weights in memory" in result.note

    def test_its_weights_are_not_the_file_s(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path / "model", "opt", "float16")
        model = load(folder)
        tied = model.lm_head.weight.data_ptr() == model.model.decoder.embed_tokens.weight.data_ptr()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        keep_in_memory(model)
        file = folder / "model.safetensors"
        with file.open("r+b") as raw:  # in place: a map sees it
            raw.write(bytes(file.stat().st_size))
        assert all(torch.equal(weight, before[k]) for k, weight in model.state_dict().items())
        embedding = model.model.decoder.embed_tokens.weight
        assert tied
        assert model.lm_head.weight.data_ptr() == embedding.data_ptr()

    def test_a_folder_that_is_not_there_is_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            plain.contend(options(tmp_path / "none", dtype="float16"))


@needs(accelerate.PACKAGES)
class TestAccelerate:
    @pytest.mark.parametrize("variant", ["opt", "llama-relu"])
    @pytest.mark.parametrize("cap_kb", [0, 250, 10_000], ids=["all-on-disk", "some", "all-fits"])
    def test_offloaded_or_not_it_decodes_what_transformers_generates(
        self, tmp_path: Path, variant: str, cap_kb: int
    ) -> None:
        folder = make_checkpoint(tmp_path / "model", variant, "float16", sharded=True)
        size = sum(parameter.nbytes for parameter in load(folder).parameters())
        cap = accelerate.PROCESS_BYTES + cap_kb * 1000
        result = accelerate.contend(options(folder, cap=cap, offload=tmp_path / "offload"))
        assert result.timed.tokens == reference(folder, TOKENS)
        kept = int(result.note.split()[0].replace(",", ""))
        if cap_kb == 250:
            assert 0 < kept <= 250_000
        else:
            assert kept == (size if cap_kb else 0)


@needs(gguf.PACKAGES)
class TestGguf:
    def written(self, folder: Path, tmp_path: Path, number_format: str = "f16") -> Any:
        path = tmp_path / f"model-{number_format}.gguf"
        gguf.write_gguf(folder, path, number_format)
        return importlib.import_module("gguf").GGUFReader(path)

    def test_it_appears_whole_and_its_bytes_are_counted(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "model", {})
        path, seen = tmp_path / "model.gguf", list[tuple[int, int]]()

        def progress(done: int, total: int) -> None:
            assert not path.exists()
            seen.append((done, total))

        gguf.write_gguf(folder, path, progress=progress)
        assert path.exists()
        assert sorted(seen) == seen
        assert seen[-1][0] == seen[-1][1]
        assert 0 < path.stat().st_size - seen[-1][1] < 10_000
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["model.gguf"]

    def test_a_write_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "model", {})

        def fail(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gguf.write_gguf(folder, tmp_path / "model.gguf", progress=fail)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def test_an_opt_becomes_a_llama_of_its_size(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "model", {"ffn_dim": 384}, family="opt")
        source = load(folder)
        reader = self.written(folder, tmp_path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        up = source.get_parameter("model.decoder.layers.1.fc1.weight").detach().numpy()
        assert list(tensors["blk.1.ffn_gate.weight"].shape) == [64, 256], "3 × 256 = 2 × 384"
        assert np.array_equal(tensors["blk.1.ffn_gate.weight"].data, up[:256])
        assert np.array_equal(tensors["blk.1.ffn_up.weight"].data, up[-256:])
        assert "output.weight" not in tensors, "tied"

    @pytest.mark.parametrize("number_format", ["q8_0", "q4_0"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_quantised_matrices_are_the_packages_own(
        self, tmp_path: Path, number_format: str, tied: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"num_key_value_heads": 2, "tie_word_embeddings": tied}
        folder = save(tmp_path / "model", config)
        plain = {one.name: one for one in self.written(folder, tmp_path).tensors}
        # Many blocks, the last one shorter: 14 rows of 64, or a head of 16.
        monkeypatch.setattr(gguf, "_BLOCK_BYTES", 14 * 64 * 4)
        package = importlib.import_module("gguf")
        reader = self.written(folder, tmp_path, number_format)
        packed = {one.name: one for one in reader.tensors}
        assert packed.keys() == plain.keys()
        head = "token_embd.weight" if tied else "output.weight"
        for name, one in packed.items():
            wanted = plain[name].data
            kind = package.GGMLQuantizationType[number_format.upper()]
            if wanted.ndim == 1:
                kind = package.GGMLQuantizationType.F32
            elif name == head:
                kind = package.GGMLQuantizationType.Q8_0
            assert one.tensor_type == kind, name
            assert list(one.shape) == list(plain[name].shape), name
            assert np.array_equal(one.data, package.quants.quantize(wanted, kind)), name
        named = reader.fields["general.file_type"].contents()
        assert named == package.LlamaFileType[f"MOSTLY_{number_format.upper()}"]

    def test_blocks_of_rows_are_the_whole_tensor(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = save(tmp_path / "model", {"num_key_value_heads": 2})
        whole = self.written(folder, tmp_path).data.copy()
        monkeypatch.setattr(gguf, "_BLOCK_BYTES", 1)  # one row, or one head
        assert np.array_equal(self.written(folder, tmp_path).data, whole)

    def test_rows_that_cannot_be_quantised_are_refused(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "model", {"intermediate_size": 80})
        with pytest.raises(StoreError, match=r"ffn_down.weight: q8_0 takes rows of a multiple of"):
            gguf.write_gguf(folder, tmp_path / "model.gguf", "q8_0")
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    @pytest.mark.parametrize(
        ("variant", "names"), [("llama-gqa", "self_attn"), ("llama-mlp-bias", "mlp")]
    )
    def test_biases_are_refused(self, tmp_path: Path, variant: str, names: str) -> None:
        folder = save(tmp_path / "model", dict(VARIANTS[variant].config))
        with pytest.raises(StoreError, match=names):
            gguf.write_gguf(folder, tmp_path / "model.gguf")

    def test_scaled_rope_is_refused(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "model", {})
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(StoreError, match="linear RoPE"):
            gguf.write_gguf(folder, tmp_path / "model.gguf")


@needs(gguf.PACKAGES | llama_cpp.PACKAGES)
class TestLlamaCpp:
    @pytest.mark.parametrize("mode", llama_cpp.MODES)
    @pytest.mark.parametrize(
        "config",
        [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}],
        ids=["plain", "gqa-tied"],
    )
    def test_its_logits_are_those_of_transformers(
        self, tmp_path: Path, mode: str, config: dict[str, Any]
    ) -> None:
        rope = {"rope_type": "default", "rope_theta": 5000.0}
        config = {"hidden_act": "silu", "rope_parameters": rope} | config
        folder, path = save(tmp_path / "model", config), tmp_path / "model.gguf"
        assert gguf.write_gguf(folder, path) == "the same weights and activation"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = model(torch.tensor([PROMPT])).logits[0].numpy()
        half = len(PROMPT) // 2
        with llama_cpp.opened(path, mode, context=len(PROMPT), prompt=half, threads=1) as opened:
            block = opened.decode(PROMPT[:half]).copy()
            steps = [opened.decode([token]).copy() for token in PROMPT[half:]]
        largest = np.abs(expected).max()
        for ours, theirs in zip([block, *steps], expected[half - 1 :], strict=True):
            assert np.abs(ours - theirs).max() < 0.01 * largest

    @pytest.mark.parametrize("number_format", ["q8_0", "q4_0"])
    @pytest.mark.parametrize("copies", [False, True])
    def test_quantised_logits_are_those_of_the_weights_that_it_stands_for(
        self, tmp_path: Path, number_format: str, copies: bool
    ) -> None:
        folder, path = save(tmp_path / "model", {"hidden_act": "silu"}), tmp_path / "model.gguf"
        note = gguf.write_gguf(folder, path, number_format)
        assert note == f"the same weights and activation; weights in {number_format.upper()}"
        package, model = importlib.import_module("gguf"), load(folder).float().eval()
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                head = name == "lm_head.weight"
                kind = package.GGMLQuantizationType["Q8_0" if head else number_format.upper()]
                packed = package.quants.quantize(weight.detach().numpy(), kind)
                weight.data = torch.from_numpy(package.quants.dequantize(packed, kind))
        with torch.inference_mode():
            expected = model(torch.tensor([PROMPT])).logits[0, -1].numpy()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            try:
                ours = apart.submit(_decoded, path, copies).result()
            except BrokenProcessPool:  # the bench runs it without copies then
                assert copies, "llama.cpp crashed"
                pytest.skip("llama.cpp crashes here with copies of its weights")
        # llama.cpp rounds activations to 8 bits, too.
        assert np.abs(ours - expected).max() < 0.15 * np.abs(expected).max()

    def test_the_program_says_that_the_activation_differs(self, tmp_path: Path) -> None:
        folder, path = save(tmp_path / "model", {"hidden_act": "relu"}), tmp_path / "model.gguf"
        gguf.write_gguf(folder, path)
        result = run_program("llama_cpp", tmp_path, path, "--mode", "mmap")
        assert len(result["tokens"]) == TOKENS + 1
        assert "SiLU, not relu" in result["note"]

    def test_an_opt_runs_as_a_llama(self, tmp_path: Path) -> None:
        folder, path = save(tmp_path / "model", {}, family="opt"), tmp_path / "model.gguf"
        note = gguf.write_gguf(folder, path)
        result = run_program("llama_cpp", tmp_path, path, "--mode", "ram")
        assert result["note"] == note
        assert len(result["ms_per_token"]) == TOKENS

    def test_a_file_that_is_no_gguf_is_a_sentence(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        with (
            pytest.raises(UserError, match="could not open"),
            llama_cpp.opened(path, "mmap", context=8, prompt=4, threads=1),
        ):
            pass


def test_a_result_has_no_field_that_its_line_loses() -> None:
    result = Result("n", "v", 1.0, Timed(1.0, [1.0], 1, 1, [1]), "")
    names = {f.name for f in (*dataclasses.fields(Result), *dataclasses.fields(Timed))}
    assert json.loads(result.to_json()).keys() == names - {"timed"}
