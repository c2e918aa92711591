"""The examples without nnU-Net, in docs/examples: each learns, the notebook and the documents say the same."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import pyplot

DOCS = Path(__file__).parents[1] / "docs"
MAX_LINES = 15  # of an example about LoMix: the loss, its optimiser, the training step


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a script finds its neighbours: from their folder."""
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(DOCS / "examples")
    return importlib.import_module


def lines_about_lomix(module: ModuleType) -> list[str]:
    """The body of the function or of the class that has the loss, without its docstring."""
    (part,) = [
        node
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "LoMixLoss(" in ast.unparse(node)
    ]
    lines = inspect.getsource(module).splitlines()[part.body[1].lineno - 1 : part.end_lineno]
    return [line.strip() for line in lines if line.strip()]


def code_cells() -> list[str]:
    cells = json.loads((DOCS / "examples" / "dynunet.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", ["dynunet", "basicunetplusplus", "lightning_module"])
@pytest.mark.filterwarnings("ignore::Warning")  # Lightning's, about versions and the number of workers
def test_each_example_learns_in_few_lines(example, name):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    module = example(name)
    assert len(lines_about_lomix(module)) <= MAX_LINES
    losses, before, after = module.run(30)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1
    assert after > before + 0.4


def test_in_basicunetplusplus_the_output_that_predicts_comes_first(example):
    """LoMix guarantees a share of the weight to its first output; the network's only one without supervision."""
    module = example("basicunetplusplus")
    network = module.make_network()
    images = torch.randn(1, 1, 64, 64)
    outputs = network(images)
    network.deep_supervision = False
    (only,) = network(images)
    assert torch.equal(outputs[::-1][0], only)
    assert torch.equal(module.predict(network, images), only)
    assert "loss(network(images)[::-1], labels)" in "\n".join(lines_about_lomix(module))


def test_all_parameters_are_given_to_the_optimizers(example):
    pytest.importorskip("lightning")
    module = example("lightning_module").LoMixModule(example("dynunet").make_network())
    groups = module.configure_optimizers().param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert [group["weight_decay"] for group in groups[1:]] == [0, 0]


def test_the_generated_labels_are_shapes_of_three_classes(example):
    shapes = example("shapes")
    [(images, labels), (others, _)] = shapes.make_batches(2, seed=0)
    assert images.shape == labels.shape == (4, 1, 64, 64)
    assert labels.unique().tolist() == [0, 1, 2]
    assert not torch.equal(images, others) and torch.equal(images, shapes.make_batches(1, seed=0)[0][0])
    perfect = torch.nn.functional.one_hot(labels[:, 0]).movedim(-1, 1).float()
    assert shapes.dice(perfect, labels) == 1
    assert shapes.dice(perfect.flip(1), labels) == 0.5  # squares for background, discs as they are


def test_the_notebook_has_the_functions_of_the_scripts_and_runs(example, monkeypatch):
    install, *cells = code_cells()
    assert "%pip install" in install
    trees = [ast.parse(cell) for cell in cells]
    functions = {f.name: ast.dump(f) for tree in trees for f in tree.body if isinstance(f, ast.FunctionDef)}
    scripts = [ast.parse(inspect.getsource(example(name))) for name in ("shapes", "dynunet")]
    assert functions == {
        f.name: ast.dump(f) for tree in scripts for f in tree.body if isinstance(f, ast.FunctionDef) and f.name != "run"
    }
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    assert sum(cell.count("make_batches(60,") for cell in cells) == 1
    names = {}
    for cell in cells:
        exec(cell.replace("make_batches(60,", "make_batches(3,"), names)
    assert len(names["losses"]) == 3


def test_the_outputs_kept_in_the_notebook_are_of_a_training_that_learned():
    notebook = json.loads((DOCS / "examples" / "dynunet.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "".join(line for output in outputs for line in output.get("text", []))
    (loss,) = re.findall(r"loss (\S+) -> (\S+) in 60 steps", text)
    (dice,) = re.findall(r"Dice (\S+) -> (\S+)", text)
    assert float(loss[1]) < float(loss[0]) - 1 and float(dice[1]) > float(dice[0]) + 0.4
    assert [output["output_type"] for output in outputs] == ["stream", "display_data", "display_data"]


def test_the_example_in_the_documents_is_that_of_the_script_and_trains(example):
    code = re.findall(r"```python\n(.*?)```", (DOCS / "method.md").read_text(), re.S)
    (snippet,) = [block for block in code if "DynUNet" in block]
    dynunet, shapes = example("dynunet"), example("shapes")
    lines = [line.strip() for line in snippet.splitlines() if line.strip() and "import " not in line]
    assert lines == [line for line in lines_about_lomix(dynunet) if "losses" not in line]
    names = {"network": dynunet.make_network(), "batches": shapes.make_batches(2, seed=0)}
    exec(snippet, names)
    assert names["value"].isfinite() and all(p.grad is not None for p in names["loss"].parameters())
