"""The benchmarks: what they measure, how results are kept and compared, the documents' tables. No time is judged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss import BACKENDS
from nnunet_lomix.loss.backends.plain import Plain
from nnunet_lomix.trainers import nnUNetTrainerLoMix

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
Module = Callable[[str], ModuleType]


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[Module]:
    """Imports a module of the benchmarks. Python has forgotten them again at the end, since they have common names."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def spread_around(median: float) -> dict[str, float]:
    return {"median": median, "p20": median - 0.1, "p80": median + 0.1}


def row(case: str, backend: str, full: float, memory: int | None = 100) -> dict[str, object]:
    row = {"case": case, "backend": backend, "default": backend == "plain", "maps": 6, "memory_mb": memory}
    return row | {
        "forward_ms": spread_around(1),
        "backward_ms": spread_around(2),
        "full_ms": spread_around(full),
        "error": 2e-7,
    }


def record(module: Module, *rows: dict[str, object], benchmark: str = "loss") -> dict:
    return module("results").make_record(benchmark, list(rows), "cpu", {"repeats": 3})


def test_every_benchmark_has_cases_and_no_two_cases_are_named_alike(module: Module) -> None:
    cases = module("cases")
    for by_device in cases.DEFAULT_CASES.values():
        assert by_device.keys() == {"cpu", "cuda"}
        assert all(name in cases.CASES for names in by_device.values() for name in names)
    texts = [str(case) for case in cases.CASES.values()]
    assert len(set(texts)) == len(texts)  # rows are matched by it


def test_the_cases_of_the_gpu_table_are_measured(module: Module) -> None:
    cases = module("cases")
    expected = {
        "(2, 14, 128 × 128 × 128), S = 5, K = 5",
        "(2, 14, 128 × 128 × 128), S = 5, K = 4",
        "(2, 3, 128 × 128 × 128), S = 5, K = 4",
        "(2, 3 regions, 128 × 128 × 128), S = 5, K = 4",
        "(12, 4, 512 × 512), S = 7, K = 4",
        "(12, 9, 128 × 128), S = 5, K = 4",
        "(16, 3, 56 × 40), S = 3, K = 3",
    }
    for benchmark in ("loss", "step"):
        assert {str(cases.CASES[name]) for name in cases.DEFAULT_CASES[benchmark]["cuda"]} == expected


def test_the_case_of_most_memory_is_just_computed_at_once(module: Module) -> None:
    case, examples = module("cases").CASES["3d-14-at-once"], module("examples")
    plain = Plain(examples.engine_case(examples.make_lomix(case), "cpu"))
    length = case.size[0] // nnUNetTrainerLoMix.stride
    at_once = [plain.pixels_at_once(case.batch, n**3, (2 * n) ** 3) for n in (length, length + 1)]
    assert at_once[0] == length**3 and at_once[1] < (length + 1) ** 3


def test_everything_takes_its_turn_and_the_warm_up_is_dropped(module: Module) -> None:
    order: list[str] = []

    def measure(name: str) -> tuple[int, int]:
        order.append(name)
        return len(order), 0

    seconds = module("measuring").take_turns({"a": lambda: measure("a"), "b": lambda: measure("b")}, turns=2, warm_up=1)
    assert order == ["a", "b"] * 3
    np.testing.assert_array_equal(seconds["a"], [[3, 0], [5, 0]])
    np.testing.assert_array_equal(seconds["b"], [[4, 0], [6, 0]])


def test_a_spread_is_the_median_and_two_percentiles(module: Module) -> None:
    times = np.random.default_rng(0).permutation(np.arange(101)) / 1000
    assert module("measuring").milliseconds(times) == pytest.approx({"median": 50, "p20": 20, "p80": 80})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
def test_peak_memory_is_what_is_needed_beyond_what_there_was(module: Module) -> None:
    there = np.ones(2**25)
    assert 250 <= module("measuring").peak_memory(lambda: np.ones(2**25), "cpu") < 300
    assert module("measuring").peak_memory(lambda: there.sum(), "cpu") < 50


def test_results_are_read_as_they_were_written(module: Module, tmp_path: Path) -> None:
    results = module("results")
    written = record(module, row("a", "plain", 3), row("a", "nnU-Net", 1, memory=None))
    results.write_record(written, tmp_path / "folder" / "loss_cpu.json")
    read = results.read_record(tmp_path / "folder" / "loss_cpu.json")
    assert read == written
    assert read["machine"]["processor"] and read["machine"]["cores"] == os.cpu_count()
    assert read["machine"]["threads"] == torch.get_num_threads()
    assert read["versions"]["torch"] == version("torch") and read["versions"]["nnunetv2"] == version("nnunetv2")
    assert read["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(read["date"])).days) <= 1
    assert results.as_table(read)["full_ms.p80"].tolist() == [3.1, 1.1]


def test_the_commit_is_told_and_whether_the_code_differs_from_it(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = module("results")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "benchmarks" / "results.py"))
    assert results.describe_commit() == {"commit": None, "dirty": None}
    for folder in ("nnunet_lomix", "trainers", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "code.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    first = subprocess.check_output([*git, "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    (tmp_path / "benchmarks" / "results.json").touch()  # a benchmark's own results are no change of the code
    assert results.describe_commit() == {"commit": first, "dirty": False}
    (tmp_path / "nnunet_lomix" / "code.py").write_text("1")
    assert results.describe_commit() == {"commit": first, "dirty": True}


DOCUMENT = """# Title

<!-- table: loss loss_cpu.json -->
stale
<!-- end of table -->

Prose with a | in it.

<!-- table: memory memory_cpu.json -->
<!-- end of table -->
"""


def test_tables_are_rewritten_between_their_marks_alone(module: Module, tmp_path: Path) -> None:
    results, documents = module("results"), module("documents")
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text("Nothing to fill in.")
    (tmp_path / "benchmarks" / "loss.md").write_text(DOCUMENT)
    rows = [row(f"(2, 3), S = 3, K = {k}", name, k) for k in (2, 3) for name in ("nnU-Net", "plain")]
    for benchmark in ("loss", "memory"):
        path = tmp_path / "results" / f"{benchmark}_cpu.json"
        results.write_record(record(module, *rows, benchmark=benchmark), path)

    changed = documents.write_documents(tmp_path, tmp_path / "results")
    assert changed == [tmp_path / "benchmarks" / "loss.md"]
    text = changed[0].read_text()
    assert "stale" not in text and "\n\nProse with a | in it.\n\n" in text
    loss, memory = ([line for line in part.splitlines() if "K = 3" in line] for part in text.split("Prose"))
    assert [cell.strip() for cell in loss[1].split("|")[1:-1]] == [
        "(2, 3), S = 3, K = 3", "plain (default)", "6", "1 (0.9 to 1.1)", "2 (1.9 to 2.1)", "3 (2.9 to 3.1)", "100",
        "2e-07",
    ]  # fmt: skip
    assert [cell.strip() for cell in memory[1].split("|")[1:-1]] == [
        "(2, 3), S = 3, K = 3", "plain", "6", "100",
    ]  # fmt: skip
    assert "`python benchmarks/run.py loss --repeats 3`" in text and version("torch") in text

    assert documents.write_documents(tmp_path, tmp_path / "results") == []


@pytest.mark.parametrize("mark, message", [("lost x.json", "no table 'lost'"), ("loss x.json", "no results x.json")])
def test_a_document_that_asks_for_what_is_not_there(module: Module, tmp_path: Path, mark: str, message: str) -> None:
    with pytest.raises(LoMixError, match=message):
        module("documents").fill_tables(f"<!-- table: {mark} -->\n<!-- end of table -->\n", tmp_path)


def test_the_pictures_are_of_the_present_defaults(module: Module) -> None:
    """Else run `python benchmarks/run.py documents`, look at the pictures, and mend what the documents say of them."""
    pictures = module("pictures")
    notes = json.loads(pictures.NOTES.read_text())
    assert notes["defaults"] == pictures.defaults_of(nnUNetTrainerLoMix)


def test_the_documents_have_the_tables_of_the_results(module: Module) -> None:
    documents = module("documents")
    texts = [path.read_text() for path in documents.list_documents()]
    assert sum(len(documents.TABLE.findall(text)) for text in texts) >= 5
    for text in texts:
        assert documents.fill_tables(text, module("results").FOLDER) == text


def run(module: Module, *args: object) -> str:
    result = CliRunner().invoke(module("run").main, [*map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


TINY = ("--case", "tiny", "--repeats", 1, "--device", "cpu")


def test_loss(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("loss"), "memory_of_loss", lambda *args: 7)  # each would be a process of its own
    names = ["nnU-Net", "plain", "plain, stride 1"]
    backends = [argument for name in names for argument in ("--backend", name)]
    output = run(module, "loss", *TINY, *backends, "--out", tmp_path / "first.json")
    assert "(2, 3, 8 × 8), S = 2, K = 2" in output
    first = json.loads((tmp_path / "first.json").read_text())
    assert first["options"] == {"threads": 1, "repeats": 1}
    nnunet, grid, everywhere = first["rows"]
    assert [r["backend"] for r in first["rows"]] == names
    assert [r["default"] for r in first["rows"]] == [False, True, False]
    assert [r["maps"] for r in first["rows"]] == [1, 6, 6]  # two outputs and four mutants of them
    assert nnunet["error"] is None and 0 < grid["error"] < 1e-5 and 0 < everywhere["error"] < 1e-5
    for r in first["rows"]:
        for part in ("forward_ms", "backward_ms", "full_ms"):
            assert 0 < r[part]["p20"] <= r[part]["median"] <= r[part]["p80"]
        assert r["full_ms"]["median"] == pytest.approx(r["forward_ms"]["median"] + r["backward_ms"]["median"])


def test_a_loss_is_of_the_default_trainers_grid_unless_it_says_otherwise(module: Module) -> None:
    cases, examples = module("cases"), module("examples")
    assert nnUNetTrainerLoMix.stride == cases.STRIDE
    tiny = cases.CASES["tiny"]
    made = {name: examples.make_loss(name, tiny, "cpu") for name in ("plain", "plain, stride 1", "fused")}
    assert {name: (loss.backend, loss.stride) for name, loss in made.items()} == {
        "plain": ("plain", 2),
        "plain, stride 1": ("plain", 1),
        "fused": ("fused", 2),
    }
    assert all(loss.share == 0 for loss in made.values())  # the maps alone, without an anchor


def test_memory(module: Module, tmp_path: Path) -> None:
    run(module, "memory", *TINY, "--backend", "plain", "--out", tmp_path / "memory.json")
    (plain,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert plain["backend"] == "plain" and plain["maps"] == 6
    assert plain["memory_mb"] is None or 0 <= plain["memory_mb"] < 100


class Wrong(Plain):
    def __call__(self, scales: Sequence[torch.Tensor], target: Any) -> torch.Tensor:
        return super().__call__([1.01 * z for z in scales], target)


def test_the_error_of_a_wrong_backend_is_seen(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "wrong", Wrong)
    tiny = module("cases").CASES["tiny"]
    for stride in ("", ", stride 1"):
        assert module("loss").error(f"plain{stride}", tiny, "cpu") < 1e-5
        assert module("loss").error(f"wrong{stride}", tiny, "cpu") > 2e-3


def test_a_backend_that_another_one_would_replace_is_not_measured(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tiny, examples = module("cases").CASES["tiny"], module("examples")
    for name in ("fused", "fused, stride 1"):
        with pytest.raises(LoMixError, match="'fused' can't compute .*: Triton has no device 'cpu'"):
            examples.losses_for(tiny, "cpu", ["plain", name])
    assert examples.losses_for(tiny, "cpu", ["plain"]) == ["plain"]
    assert examples.losses_for(tiny, "cpu") == ["nnU-Net", "plain", "plain, stride 1"]


def test_step(module: Module, tmp_path: Path) -> None:
    output = run(module, "step", *TINY, "--backend", "plain, stride 1", "--out", tmp_path / "step.json")
    assert "default (plain)" in output
    nnunet, default, named = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [r["backend"] for r in (nnunet, default, named)] == ["nnU-Net", "default", "plain, stride 1"]
    assert [r["maps"] for r in (nnunet, default, named)] == [1, 6, 6]
    assert default["computed_by"] == "plain"
    assert nnunet["ratio"]["median"] == 1
    assert default["ratio"]["median"] == pytest.approx(default["step_ms"]["median"] / nnunet["step_ms"]["median"])
    assert default["memory_mb"] is None


@pytest.mark.parametrize("name, backend, stride", [("default", None, 2), ("plain, stride 1", "plain", 1)])
@pytest.mark.parametrize("regions", [False, True])
def test_a_step_is_that_of_the_trainer_on_outputs_of_the_case(
    module: Module, regions: bool, name: str, backend: str | None, stride: int
) -> None:
    step, case = module("step"), module("cases").Case(2, 3, (16, 24, 8), 3, 2, regions)
    environment = dict(os.environ)
    with step.nnunet_folders():
        trainer = step.make_trainer(name, case, "cpu")
        batch = step.make_batch(case, "cpu")
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.train_step(batch)
        outputs = trainer.network(batch["data"])
    assert dict(os.environ) == environment
    assert isinstance(trainer, nnUNetTrainerLoMix)
    assert (trainer.loss.backend, trainer.loss.stride) == (backend, stride)
    assert len(trainer.loss.maps) == module("examples").count_maps(name, case) == 3 + 4
    assert trainer.loss.criterion.regions == regions
    sizes = [(16, 24, 8), (8, 12, 4), (4, 6, 2)]
    assert [tuple(z.shape) for z in outputs] == [(2, 3, *size) for size in sizes]
    assert [tuple(t.shape) for t in batch["target"]] == [(2, 3 if regions else 1, *size) for size in sizes]
    assert all(not torch.equal(p, old) for p, old in zip(trainer.network.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Counts and estimates of kernels compiled in a process of their own: this one has Triton's interpreter."""
    pytest.importorskip("triton")
    code = """
import json, kernels
from cases import CASES
counts = [
    [[kernels.count(gpu, kernel, scales, 3, regions) for scales in (4, 6)] for kernel in ("forward", "backward")]
    for gpu, regions in (("A100", True), ("H100", False))
]
stacks = [
    kernels.count(gpu, kernel, scales, classes)["stack"]
    for gpu in ("A100", "H100") for kernel in kernels.KERNELS for scales in (4, 5) for classes in (14, 32)
]
estimates = [[kernels.estimate(CASES[name], stride) for stride in (2, 1)] for name in ("3d-14", "hippocampus-2d")]
print(json.dumps({"counts": counts, "stacks": stacks, "estimates": estimates}))
"""
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=BENCHMARKS, text=True))


def test_instructions_of_each_operator_are_counted_without_a_gpu(compiled: dict[str, Any]) -> None:
    """With more scales there is more to do for operators that look at each, and the same where a product did it."""
    for of_gpu in compiled["counts"]:
        for kernel, (four, six) in zip(("forward", "backward"), of_gpu, strict=True):
            assert list(four) == ["registers", "stack", "sum", "product", "fusion", "concat", "unmixed"]
            assert 16 < four["registers"] < six["registers"] <= 255
            for operator in ("sum", "product", "fusion"):
                assert 1.1 * four[operator] < six[operator] < 200
            for operator in ("concat", "unmixed"):
                assert 10 < six[operator] == pytest.approx(four[operator], rel=0.08)
            assert four["fusion"] > 1.2 * four["sum"]
            assert kernel == "forward" or four["product"] > 1.2 * four["sum"]


def test_kernels_need_no_stack(compiled: dict[str, Any]) -> None:
    """Registers that have no room spill to memory, which would take longer than all else."""
    assert compiled["stacks"] == [0] * 16


def test_the_time_on_an_h100_is_estimated_from_what_was_counted(compiled: dict[str, Any]) -> None:
    (grid, everywhere), (small, _) = compiled["estimates"]
    for made in (grid, everywhere):
        parts = [made[f"{part}_ms"] for part in ("forward", "backward", "products", "memory")]
        assert made["estimate_ms"] == pytest.approx(sum(parts)) and min(parts) > 0.1
    # the forward pass of several slabs is repeated; there are eight times the pixels
    of_grid, of_everywhere = (1 if made["slabs"] == 1 else 2 for made in (grid, everywhere))
    assert of_everywhere == 2
    assert everywhere["forward_ms"] / of_everywhere == pytest.approx(8 * grid["forward_ms"] / of_grid)
    assert everywhere["backward_ms"] == pytest.approx(8 * grid["backward_ms"])
    # 182 rows of 4 · 14 columns, three products and those of forward passes, 2 · 64³ pixels, 40 TFLOP/s
    assert grid["products_ms"] == pytest.approx(1000 * (3 + of_grid) * 2 * 182 * 56 * 2 * 64**3 / 40e12)
    assert small["estimate_ms"] == pytest.approx(0.86)  # of the host: 172 operations


def test_gpu_is_tried_without_one(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter would take long
    parts = ("--part", "loss", "--part", "step", "--part", "kernels")
    output = run(module, "gpu", *TINY, *parts, "--out", tmp_path / "gpu.json")
    assert os.listdir(tmp_path) == ["gpu.json"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    case = str(module("cases").CASES["tiny"])
    rows = {(r["part"], r["what"]): r for r in written["rows"]}
    assert {r["case"] for r in written["rows"]} == {case}
    assert rows.keys() == {
        ("loss", "nnU-Net"), ("loss", "plain"), ("loss", "plain, stride 1"), ("step", "nnU-Net"), ("step", "default"),
        ("kernels", "failure"),
    }  # fmt: skip
    assert [rows["loss", what]["maps"] for what in ("nnU-Net", "plain", "plain, stride 1")] == [1, 6, 6]
    assert all(r["full_ms"]["median"] > 0 for (part, _), r in rows.items() if part == "loss")
    assert rows["step", "default"]["ratio"]["median"] > 0
    assert rows["kernels", "failure"]["failure"] == "LoMixError: this part needs CUDA"
    assert "LoMixError: this part needs CUDA" in output and "default" not in output.split("kernels")[0]


def test_the_checks_on_a_gpu_cover_scales_classes_and_kinds(module: Module) -> None:
    checks = module("cases").CHECKS
    assert {(c.scales, c.classes) for c in checks} == {(s, c) for s in range(3, 9) for c in (3, 9, 14, 17)}
    for classes in (3, 9, 14, 17):
        assert len({(c.regions, c.ignore) for c in checks if c.classes == classes}) == 4
    assert len({str(c) for c in checks}) == len(checks)


def test_a_check_sees_a_difference_between_the_kernels_and_plain(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, check = module("gpu"), module("cases").Check(3, 3, False, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (right,) = gpu.compare_with_plain(check, "cpu")
    assert right["what"] == "fused against plain" and right["error"] < 1e-5
    monkeypatch.setattr(gpu.fused, "Plain", Wrong)
    (wrong,) = gpu.compare_with_plain(check, "cpu")
    assert wrong["error"] > 1e-3


def gpu_row(part: str, what: str, case: str = "a", **figures: object) -> dict[str, object]:
    return {"part": part, "case": case, "what": what, **figures}


def test_the_gpu_table_has_the_default_beside_nnunet(module: Module) -> None:
    rows = [
        gpu_row("loss", "nnU-Net", full_ms=spread_around(4)),
        gpu_row("loss", "fused", full_ms=spread_around(12)),
        gpu_row("loss", "fused, stride 1", full_ms=spread_around(20)),
        gpu_row("step", "default, compiled", ratio=spread_around(1.1)),
        gpu_row("step", "default", ratio=spread_around(1.08)),
        gpu_row("loss", "failure", "b", failure="OutOfMemoryError: 1 GB"),
        gpu_row("epochs", "nnUNetTrainer", "c", epoch_s=2.0, epoch_ratio=1.0),
        gpu_row("epochs", "nnUNetTrainerLoMix", "c", epoch_s=2.5, epoch_ratio=1.25),
        gpu_row("correctness", "fused against plain", "d", error=3e-6),
        gpu_row("tests", "pytest", "e", passed=False, summary="1 failed, 2 passed"),
    ]
    made = module("results").make_record("gpu", rows, "cpu", {})
    tables = module("documents").TABLES
    assert tables["gpu"](made).values.tolist() == [["a", "12 (20)", "4", "1.10 (1.08)"], ["c", "", "", "1.25"]]
    assert tables["gpu_checks"](made).values.tolist() == [
        ["loss", "b", "failure", "OutOfMemoryError: 1 GB"],
        ["correctness", "d", "fused against plain", "3e-06"],
        ["tests", "e", "pytest", "1 failed, 2 passed"],
    ]


def test_the_kernels_of_a_gpu_stand_beside_their_estimates(module: Module) -> None:
    times = {f"{part}_ms": 4.0 for part in ("forward_kernel", "backward_kernel", "other")}
    counts = {"maps": 48, "launches": 30.0, "copies": 1.0}
    estimate = {"forward_ms": 3.0, "backward_ms": 2.5, "products_ms": 0.5, "memory_ms": 1.0, "estimate_ms": 7.0}
    rows = [
        gpu_row("kernels", "nnU-Net", **times, **counts),
        gpu_row("kernels", "fused", **times, **counts, estimate=estimate),
    ]
    made = module("results").make_record("gpu", rows, "cpu", {})
    assert module("documents").TABLES["gpu_kernels"](made).values.tolist() == [
        ["a", "nnU-Net", "48", "4", "4", "4", "30", "1"],
        ["a", "fused", "48", "4 (3)", "4 (2.5)", "4 (1.5)", "30", "1"],
    ]


def test_what_is_compiled_and_what_is_estimated_are_two_tables(module: Module) -> None:
    rows = [
        {"gpu": "H100", "case": "K = 4, 14 classes", "what": "forward", "registers": 160, "sum": 55.25},
        {"gpu": "H100", "case": "a", "what": "stride 2", "slabs": 1, "forward_ms": 1.2345},
    ]
    made = module("results").make_record("kernels", rows, None, {})
    kernels, estimate = (module("documents").TABLES[name](made) for name in ("kernels", "estimate"))
    assert [*kernels.columns, *kernels.iloc[0]] == [
        "gpu", "case", "what", "registers", "sum", "H100", "K = 4, 14 classes", "forward", "160", "55",
    ]  # fmt: skip
    assert [*estimate.columns, *estimate.iloc[0]] == [
        "gpu", "case", "what", "slabs", "forward, ms", "H100", "a", "stride 2", "1", "1.23",
    ]  # fmt: skip


def test_what_fails_on_a_gpu_stops_nothing_else(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")

    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "measure_loss", broken)
    monkeypatch.setattr(gpu, "run_tests", lambda: [{"what": "pytest", "passed": True, "summary": "2 passed"}])
    (tests, loss) = gpu.measure(["loss", "tests"], ["tiny"], "cpu", 1, side_by_side=False)
    assert tests[0]["summary"] == "2 passed"
    assert loss[0]["failure"] == "RuntimeError: an illegal memory access"


def test_a_first_run_that_fails_is_not_measured_and_one_without_times_not_repeated(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = module("gpu")

    def first_run(task: object, **_: object) -> list[dict[str, object]]:
        what, figures = ("failure", {"failure": "it took longer"}) if task.name == "bad" else ("first", {})
        return [{"part": task.part, "case": task.name, "what": what, **figures}]

    def task(part: str, name: str) -> object:
        return gpu.Task(part, name, lambda: [{"what": "again"}])

    tasks = [task("loss", "bad"), task("loss", "good"), task("correctness", "good")]
    monkeypatch.setattr(gpu, "list_tasks", lambda *args: tasks)
    monkeypatch.setattr(gpu, "run_in_process", first_run)
    rows = gpu.measure(["loss", "correctness"], [], "cuda", 1, side_by_side=True)
    assert [row["what"] for (row,) in rows] == ["failure", "again", "first"]


def test_a_command_that_takes_too_long_is_ended(module: Module) -> None:
    run_for = module("gpu").run_for
    for_ever = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(9999)'])"
    with pytest.raises(LoMixError, match="it took longer than 0.5 s"):
        run_for([sys.executable, "-c", for_ever], 0.5, {})
    assert run_for([sys.executable, "-c", "import os; print(os.environ['A']); exit(3)"], 60, {"A": "b"}) == (3, "b\n")
