# SPDX-License-Identifier: Apache-2.0
"""The `mikernels` command: what it prints, what it writes, how it fails."""

import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import typer
from decoder_cases import saved_tokenizer, tiny

import mikernels
from mikernels import _ext, cli
from mikernels._dispatch import OPS
from mikernels.activations import ModelSource, write_shards
from mikernels.cli.options import count
from mikernels.evaluate import measure_reconstruction
from mikernels.models.load import LocalModel
from mikernels.nn import ARCHITECTURES
from mikernels.training import Trainer, load_sae
from mikernels.training.state.checkpoint import checkpoints
from mikernels.values.batch import Batch


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mikernels ...` in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mikernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def acts(tmp_path):
    torch.manual_seed(0)
    write_shards(tmp_path / "acts", [torch.randn(600, 8)])
    return tmp_path / "acts"


SMALL = ("--expansion", 2, "--k", 3, "--batch-size", 50, "--log-every", 1, "--lr", 0.01)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [row["loss"] for row in rows_of(out)]


def test_version(command):
    assert command("--version") == (0, f"{mikernels.__version__}\n", "")


def test_info_prints_versions_levels_and_every_operator(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("MIKERNELS_ARCHS", "9.0")
    code, out, _ = command("info")
    assert code == 0
    assert torch.__version__.split("+")[0] in out
    assert "MIKERNELS_ARCHS=9.0" in out
    assert all(name in out for name in OPS)
    assert all(level in out for level in mikernels.supported_levels())


def test_info_json_holds_the_same_facts(command):
    code, out, _ = command("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["mikernels"] == mikernels.__version__
    assert facts["supported_levels"] == list(mikernels.supported_levels())
    assert facts["operators"].keys() == OPS.keys()
    assert all(op["reference"] == "ready" for op in facts["operators"].values())
    if not torch.cuda.is_available():
        assert not any(op["triton"] == "ready" for op in facts["operators"].values())
    assert {"encode", "decode", "row_topk"} <= facts["operators"].keys()
    # as the documentation has it
    page = (Path(__file__).parents[1] / "docs" / "operators.md").read_text(encoding="utf-8")
    rows = page.splitlines()
    for name in facts["not_run"]["cuda"]:
        (row,) = (row for row in rows if row.startswith(f"| `{name}`"))
        assert "compiles, not run on a GPU" in row


def test_info_names_reason_and_remedy_without_the_extension(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_ext, "C", None)
    monkeypatch.setattr(_ext, "MISSING", "no C++ compiler [c++]; mend it with `make`")
    code, out, _ = command("info", "--peaks")
    assert code == 0
    assert "no C++ compiler [c++]" in out
    assert "MIKERNELS_EXT=cpu pip install" in out
    assert "none without the extension" in out


def test_every_option_explains_itself():
    for command in typer.main.get_command(cli.app).commands.values():
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize("name", ["info", "demo", "train", "eval", "circuits"])
def test_help_shows_examples_and_groups(command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"mikernels {name}" in out
    assert "Example" in out
    if name == "train":
        assert all(panel in out for panel in ("Activations", "SAE", "Training", "Output"))


def test_every_command_that_prints_figures_writes_them_too():
    commands = typer.main.get_command(cli.app).commands
    without = {
        name for name, c in commands.items() if all("--json" not in p.opts for p in c.params)
    }
    # it has options of its own, tested with it; a table is what it writes
    assert without == {"bench", "tune"}


def test_completion_knows_commands_and_options_without_torch(run_python):
    script = """
    import sys
    from mikernels.cli import app
    sys.argv = ["mikernels"]
    try:
        app(prog_name="mikernels")
    finally:
        print("torch" in sys.modules)
    """
    words = {"_MIKERNELS_COMPLETE": "complete_bash", "COMP_WORDS": "mikernels train --tar"}
    said = run_python(script, COMP_CWORD="2", **words)
    assert said.split() == ["--target-site", "--target-layer", "False"]


def test_bench_hands_its_arguments_on(command):
    code, out, _ = command("bench", "--list")
    assert code == 0
    assert "encode" in out


def test_train_writes_metrics_and_a_checkpoint(command, acts, tmp_path):
    code, out, _ = command("train", "--activations", acts, "--out", tmp_path / "run", *SMALL)
    assert code == 0
    assert "FVU" in out
    # the activations once: 12 batches of 50
    assert len(losses(tmp_path / "run")) == 12
    sae = load_sae(tmp_path / "run" / "checkpoint-12")
    assert (sae.config.d, sae.config.n_features, sae.config.k) == (8, 16, 3)


def test_train_resumes_to_the_losses_of_an_uninterrupted_run(command, acts, tmp_path):
    common, figures = ("train", "--activations", acts, *SMALL), tmp_path / "figures.json"
    whole = (*common, "--out", tmp_path / "whole", "--tokens", "1k", "--json", figures)
    assert command(*whole)[0] == 0
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(figures.read_text())["last"] == last and last["step"] == 20
    assert command(*common, "--out", tmp_path / "parts", "--tokens", 350)[0] == 0
    code, out, _ = command(*common, "--out", tmp_path / "parts", "--tokens", "1k", "--resume")
    assert code == 0
    assert "resumed at step 7 of 20" in out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ("--step", "autograd", "--optimizer", "SGD"),
        ("--step", "dense"),
        ("--dtype", "bfloat16", "--accumulate", 2),
        ("--arch", "batch_topk", "--step", "autograd"),
        ("--warmup", 2, "--decay", "cosine", "--k-start", 8, "--k-anneal", 3, "--clip-norm", 0),
    ],
)
def test_train_takes_every_kind_of_step_and_schedule(command, acts, tmp_path, options):
    code, _, err = command(
        "train", "--activations", acts, "--out", tmp_path / "run", *SMALL, "--tokens", 300, *options
    )
    assert code == 0, err
    assert losses(tmp_path / "run")


@pytest.fixture
def model(tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "model")
    saved_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("sites", "d", "targets"),
    [
        (("--layer", 0, "--layer", 1, "--arch", "crosscoder"), 48, ()),
        (("--layer", 1, "--site", "mlp_in", "--target-site", "mlp_out"), 24, ("1.mlp_out",)),
        (
            ("--layer", 0, "--layer", 1, "--target-layer", 1, "--target-layer", 2)
            + ("--arch", "cross_layer_transcoder"),
            48,
            ("1.residual", "2.residual"),
        ),
    ],
)
def test_train_reads_a_model_at_the_sites_asked_for(
    command, model, tmp_path, monkeypatch, sites, d, targets
):
    made = []
    inner = ModelSource.__init__

    def init(self, *arguments, **options):
        inner(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(ModelSource, "__init__", init)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 40)
    code, _, err = command(
        "train", "--model", model, "--text", text, *sites, "--context", 16, "--tokens", 300,
        "--out", tmp_path / "run", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    assert len(losses(tmp_path / "run")) == 6
    assert load_sae(tmp_path / "run" / "checkpoint-6").config.d == d
    (source,) = made
    # of 1,040 tokens: 22 windows have the 300 rows that are trained on, and a sixteenth more
    assert source.read_tokens == 22 * 16
    assert all(row["waiting_seconds"] >= 0 for row in rows_of(tmp_path / "run"))
    layers = [value for name, value in zip(sites, sites[1:], strict=False) if name == "--layer"]
    place = "mlp_in" if "--site" in sites else "residual"
    assert source.sites == tuple(f"{layer}.{place}" for layer in layers)
    assert source.target_sites == targets


def interrupted(monkeypatch, step):
    """Ctrl-C in the midst of a step."""
    inner, sent = Trainer._step_on, []

    def step_on(self, batches):
        inner(self, batches)
        if self.step == step - 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step_on", step_on)


def test_train_several_sites_and_settings_interrupted_and_resumed(
    command, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    text = tmp_path / "a text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 40)
    common = ("train", "--model", model, "--text", text, "--context", 16, "--tokens", 300, *SMALL)
    several = (*common, "--sites", "0,2.mlp_out", "--k", 2, "--out", tmp_path / "runs")
    names = ["0.residual-k2", "0.residual-k3", "2.mlp_out-k2", "2.mlp_out-k3"]
    with monkeypatch.context() as patched:
        interrupted(patched, 4)
        code, out, err = command(*several)
    assert code == 130 and "2.mlp_out-k3: TopKSAE: d 24" in out
    again = shlex.join(map(str, ["mikernels", *several, "--resume"]))
    assert "0.residual-k2 at step 4" in err and f"; run `{again}` to continue" in err
    # one of them goes on as an ordinary run, the others without it
    alone = (*common, "--layer", 2, "--site", "mlp_out", "--resume")
    assert command(*alone, "--out", tmp_path / "runs" / names[3])[0] == 0
    code, out, err = command(*several, "--resume", "--export-saelens", tmp_path / "saelens")
    assert code == 0, err
    assert "0.residual-k2: resumed at step 4 of 6" in out
    assert f"saved in {tmp_path / 'runs' / names[1]}" in out
    whole = command(*common, "--layer", 0, "--out", tmp_path / "whole")
    assert whole[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "runs" / "0.residual-k3")
    assert "blocks.2.hook_mlp_out" in (tmp_path / "saelens" / names[2] / "cfg.json").read_text()
    code, _, err = command(*several, "--resume")
    assert code == 2 and "total_tokens (--tokens) must be above 300" in err and "got 300" in err
    code, _, err = command(*alone, "--out", tmp_path / "runs")
    assert code == 2 and f"with the runs {', '.join(names)} in it" in err
    judged = ("--model", model, "--text", text, "--layer", 0, "--context", 16)
    code, _, err = command("eval", tmp_path / "runs", *judged)
    assert code == 2 and f"which holds the runs {', '.join(names)}: give one of these" in err
    code, _, err = command(*common, "--layer", 0, "--layer", 1, "--out", tmp_path / "run")
    assert code == 2 and "for an SAE for each layer give --sites 0.residual,1.residual" in err


def test_train_sweeps_over_activations_and_logs(command, acts, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    sweep = ("train", "--activations", acts, *SMALL, "--arch", "topk", "--arch", "relu", "--k", 5)
    code, out, err = command(*sweep, "--out", tmp_path / "runs", "--log-to", "tensorboard")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "relu", "topk-k3", "topk-k5",
    ]  # fmt: skip
    assert len(list((tmp_path / "runs" / "relu").glob("events.out.tfevents.*"))) == 1
    assert command("train", "--activations", acts, *SMALL, "--out", tmp_path / "one")[0] == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "runs" / "topk-k3")


def test_train_says_what_a_resume_with_other_tokens_does(command, acts, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    run = ("train", "--activations", acts, *SMALL, "--out", tmp_path / "run")
    with monkeypatch.context() as patched:
        interrupted(patched, 3)
        code, _, err = command(*run)
    assert (
        code == 130 and f"saved {tmp_path / 'run' / 'checkpoint-3'}; run `mikernels train " in err
    )
    assert command(*run)[0] == 2  # without --resume
    code, _, err = command(*run, "--resume", "--tokens", "2k")
    assert code == 0
    assert "total_tokens was 600 and is 2,000: from step 3 on the schedule is that of 40" in err
    for options, said in (
        (("--tokens", "1k"), "total_tokens must be at least 2,000"),
        (("--tokens", "2k"), "total_tokens (--tokens) must be above 2,000, where "),
        (("--tokens", "3k", "--arch", "relu"), "must hold architecture = relu, got topk"),
    ):
        code, _, err = command(*run, "--resume", *options)
        assert code == 2 and said in err, err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--layer", 3), "blocks.3.hook_resid_post"),
        (("--layer", 3, "--site", "mlp_out"), "blocks.3.hook_mlp_out"),
        (("--layer", 3, "--site", "mlp_in"), None),
        (("--layer", 3, "--layer", 4), None),
        ((), None),
    ],
)
def test_train_names_the_place_for_saelens(command, acts, tmp_path, arguments, name):
    folder = tmp_path / "saelens"
    code, _, err = command(
        "train", "--activations", acts, "--out", tmp_path / "run", *SMALL, *arguments,
        "--export-saelens", folder,
    )  # fmt: skip
    assert code == 0, err
    text = (folder / "cfg.json").read_text()
    assert (f'"{name}"' in text) if name else ("hook_resid" not in text and "blocks." not in text)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_train_takes_every_architecture(command, tmp_path, arch):
    x = torch.randn(600, 8)
    targets = x.tanh() if ARCHITECTURES[arch].needs_target else None
    given = [x] if targets is None else [{"activations": x, "targets": targets}]
    write_shards(tmp_path / "acts", given)
    layers = {
        "crosscoder": ["--set", "n_layers=2"],
        "cross_layer_transcoder": ["--set", "n_layers=2"],
    }
    code, out, err = command(
        "train", "--activations", tmp_path / "acts", "--out", tmp_path / "run", *SMALL,
        "--tokens", 300, "--arch", arch, *layers.get(arch, []),
    )  # fmt: skip
    assert code == 0, err
    sae = load_sae(checkpoints(tmp_path / "run")[-1])
    assert sae.architecture == arch and type(sae).__name__ in out
    assert "FVU" in out


def test_train_sets_what_an_architecture_has(command, acts, tmp_path):
    code, _, err = command(
        "train", "--activations", acts, "--out", tmp_path / "run", *SMALL, "--tokens", 300,
        "--arch", "matryoshka", "--set", "widths=[8,16]", "--set", "detach=true",
    )  # fmt: skip
    assert code == 0, err
    config = load_sae(checkpoints(tmp_path / "run")[-1]).config
    assert config.widths == (8, 16) and config.detach is True
    for setting in ("target_l0=3", "widths"):
        code, _, err = command(
            "train", "--activations", acts, "--out", tmp_path / "other", *SMALL,
            "--arch", "matryoshka", "--set", setting,
        )  # fmt: skip
        assert code == 2 and "--set must be name=value with a name among" in err


def test_train_exports_for_saelens(command, acts, tmp_path):
    from mikernels.integrations import saelens

    folder = tmp_path / "saelens"
    code, _, err = command(
        "train",
        "--activations",
        acts,
        "--out",
        tmp_path / "run",
        *SMALL,
        "--export-saelens",
        folder,
    )
    assert code == 0, err
    exported, trained = saelens.load_sae(folder), load_sae(tmp_path / "run" / "checkpoint-12")
    assert torch.allclose(exported.w_enc, trained.w_enc)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --activations PATH, or --model PATH"),
        (("--activations", "{acts}", "--model", "{acts}"), "give either --activations"),
        (("--activations", "nowhere"), "existing folder of safetensors shards, got nowhere"),
        (("--model", "nowhere"), "--model needs --layer NUMBER and --text FILE"),
        (("--model", "nowhere", "--layer", "0", "--text", "absent.txt"), "absent.txt must be"),
        (("--activations", "{acts}", "--site", "mlp"), "--site must be one of residual, mlp_in"),
        (("--activations", "{acts}", "--target-site", "mlp"), "--target-site must be one of"),
        (("--activations", "{acts}", "--target-layer", "1"), "must go with --model, got it with"),
        (
            ("--model", "nowhere", "--layer", "0", "--text", "{text}"),
            "--model must be a folder, a .gguf",
        ),
        (("--activations", "{acts}", "--k", "500"), "k must be in 1..16"),
        (("--activations", "{acts}", "--k", "3"), "--k must be given once for each SAE, got 3"),
        (("--activations", "{acts}", "--log-to", "x"), "--log-to must be tensorboard or wandb"),
        (("--activations", "{acts}", "--sites", "1"), "--sites must go with --model and without"),
        (("--model", "x", "--text", "{text}", "--sites", "1,1"), "--sites must name at least one"),
        (("--model", "x", "--text", "{text}", "--sites", ","), "--sites must name at least one"),
        (
            ("--model", "x", "--layer", "1", "--layer", "2", "--text", "{text}"),
            "--layer may be repeated to join layers into the input of one --arch crosscoder",
        ),
        (
            ("--activations", "{acts}", "--arch", "crosscoder", "--export-saelens", "out"),
            "--export-saelens must go with an architecture that SAELens has",
        ),
        (("--activations", "{acts}", "--arch", "transcoder"), "must be a Batch with a target"),
        (("--activations", "{acts}", "--arch", "vae"), "--arch must be one of"),
        (("--activations", "{acts}", "--lr", "-1"), "lr must be finite and above 0, got -1"),
        (("--activations", "{acts}", "--decay", "wild"), "decay must be one of"),
        (("--activations", "{acts}", "--tokens", "many"), "expected a number such as 500k"),
        (("--activations", "{acts}", "--optimizer", "SGD"), "--optimizer needs --step autograd"),
        (("--activations", "{acts}", "--optimizer", "X", "--step", "dense"), "torch.optim"),
        (
            ("--activations", "{acts}", "--optimizer", "lr_scheduler", "--step", "dense"),
            "torch.optim",
        ),
        (("--activations", "{acts}", "--optimizer", "LBFGS", "--step", "dense"), "needs a closure"),
        (("--activations", "{acts}", "--features", "0"), "n_features must be at least 1, got 0"),
        (("--activations", "{acts}", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("--activations", "{acts}", "--device", "gpu"), "--device must be cpu, cuda or cuda:N"),
        (
            ("--activations", "{acts}", "--device", "cuda:99"),
            "--device must be one that torch sees",
        ),
        (("--activations", "{acts}", "--device", "cpu", "--cuda-graph"), "needs a CUDA device"),
        (("--activations", "{acts}", "--resume"), "must hold a checkpoint-<step> folder"),
    ],
)
def test_train_bad_input_is_one_message_and_code_2(
    command, acts, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setenv("COLUMNS", "1000")
    text = tmp_path / "text.txt"
    text.write_text("hello")
    filled = [a.format(acts=acts, text=text) for a in arguments]
    code, _, err = command("train", *SMALL, "--out", tmp_path / "run", *filled)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mikernels", "--debug", "train", "--activations", "nowhere"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_an_error_that_is_not_the_users_has_code_1(command, acts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mikernels.training.Trainer.run", full)
    code, _, err = command("train", "--activations", acts, "--out", tmp_path / "run", *SMALL)
    assert code == 1
    assert "No space left on device" in err


@pytest.mark.parametrize(("agree", "code"), [(True, 0), (False, 1)])
def test_demo_fails_when_the_losses_disagree(command, monkeypatch, tmp_path, agree, code):
    monkeypatch.setattr("mikernels.demo.run.run_demo", lambda *_: {"agree": agree, "x": math.nan})
    figures = tmp_path / "demo.json"
    assert command("demo", "--data", "mnist", "--json", figures)[0] == code
    assert json.loads(figures.read_text()) == {"agree": agree, "x": None}
    # refused before anything is trained
    assert command("demo", "--json", tmp_path / "no" / "demo.json")[0] == 2


def test_demo_refuses_bad_options(command):
    code, _, err = command("demo", "--data", "cifar")
    assert code == 2
    assert "data must be 'smollm2' or 'mnist', got 'cifar'" in " ".join(err.split())
    assert command("demo", "--steps", 10, "--baseline-steps", 10)[0] == 2


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("500k", 500_000), ("10M", 10**7), ("1.5b", 1_500_000_000), ("1_000", 1000)],
)
def test_count_reads_suffixes(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "1.5", "1e", "nan"])
def test_count_refuses_what_is_no_count(text):
    with pytest.raises(typer.BadParameter):
        count(text)


@pytest.mark.parametrize("arch", ["topk", "transcoder"])
def test_eval_compares_with_the_target_that_was_learned(command, tmp_path, arch):
    torch.manual_seed(0)
    x, y = torch.randn(2, 600, 8).unbind()
    write_shards(tmp_path / "acts", [{"activations": x, "targets": y}])
    write_shards(tmp_path / "bare", [x])
    run, found = tmp_path / "run", tmp_path / "found.json"
    acts = ("--activations", tmp_path / "acts")
    code, _, err = command("train", *acts, "--arch", arch, "--out", run, *SMALL)
    assert code == 0, err
    code, _, err = command("eval", run, *acts, "--json", found)
    assert code == 0, err
    sae = load_sae(run / "checkpoint-12")
    fvu = float(
        (sae.decode(sae.encode(x)).detach() - y).square().sum() / (y - y.mean(0)).square().sum()
    )
    measured = json.loads(found.read_text())["reconstruction"]["fvu"]
    assert measured == pytest.approx(fvu, rel=1e-5)
    # of the same width, and so easily taken for what it should give
    code, _, err = command("eval", run, "--activations", tmp_path / "bare")
    assert code == 2
    assert "has learned to give a target" in " ".join(err.split())


@pytest.mark.parametrize("arch", ["topk", "transcoder"])
def test_eval_reads_the_target_from_the_model(command, model, tmp_path, arch):
    text, run, found = tmp_path / "text.txt", tmp_path / "run", tmp_path / "found.json"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 10)
    at = ("--model", model, "--text", text, "--layer", 1, "--site", "mlp_in", "--context", 16)
    code, _, err = command(
        "train", *at, "--target-site", "mlp_out", "--arch", arch, "--tokens", 100, "--out", run,
        *SMALL,
    )  # fmt: skip
    assert code == 0, err
    # the layer alone: the site is the run's
    alone = [word for word in at if word not in ("--site", "mlp_in")]
    code, _, err = command("eval", run, *alone, "--no-spliced", "--json", found)
    assert (code, err) == (0, "")
    network = LocalModel(model)
    source = ModelSource(
        network.model(), network.tokenizer(), "1.mlp_in", [text.read_text()], context=16,
        target="1.mlp_out",
    )  # fmt: skip
    # whole windows, as eval has them
    rows = [*source.read_windows([w for w in source.token_windows() if len(w) == 16])]
    x, y = (torch.cat([part[name] for part in rows]).float() for name in ("activations", "targets"))
    measured = measure_reconstruction(load_sae(run / "checkpoint-2"), Batch(x, y)).fvu
    assert json.loads(found.read_text())["reconstruction"]["fvu"] == pytest.approx(measured)
    # the reconstruction of an MLP's output has no place in the residual stream
    residual = [word if word != "mlp_in" else "residual" for word in at]
    code, _, err = command("eval", run, *residual)
    assert code == 2 and "was trained at 1.mlp_in, and is given 1.residual" in " ".join(err.split())
    assert "has learned a target" in " ".join(err.split())


@pytest.fixture(scope="module")
def letters_model(tmp_path_factory):
    """A model of random weights that reads letters."""
    folder = tmp_path_factory.mktemp("circuits") / "letters"
    tiny("llama", torch.float32).save_pretrained(folder)
    saved_tokenizer(folder)
    return folder


def test_circuits_prints_and_writes_what_the_library_finds(command, letters_model, tmp_path):
    from mikernels.circuits import faithfulness_curve, find_circuit
    from mikernels.models.load import LocalModel

    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code, out, err = command(
        "circuits", "--model", letters_model, "--prompt", "c n o i b", "--prompt", "f e h i </b>",
        "--counterfactual", "c n o e b", "--counterfactual", "f e h e </b>", "--answer", "g",
        "--wrong", "k", "--compare", "eap", "--k", 3, "--edges", 7, "--out", page,
        "--json", numbers,
    )  # fmt: skip
    assert code == 0, err
    local = LocalModel(letters_model)
    found = find_circuit(
        local.model(head=True), ["c n o i b", "f e h i </b>"], ["c n o e b", "f e h e </b>"],
        ("g", "k"), tokenizer=local.tokenizer(),
    )  # fmt: skip
    written = json.loads(numbers.read_text())
    assert [c["method"] for c in written["circuits"]] == ["gim", "eap"]
    gim = written["circuits"][0]
    assert gim["values"] == pytest.approx(found.values.tolist(), rel=1e-5)
    scores = found.scores.flatten()
    best = scores.abs().argsort(descending=True, stable=True)[:7].tolist()
    assert [e["name"] for e in gim["edges"]] == [
        f"{found.graph.writers[i // len(found.graph.readers)]} -> "
        f"{found.graph.readers[i % len(found.graph.readers)]}"
        for i in best
    ]
    values = [e["score"]["value"] for e in gim["edges"]]
    assert values == pytest.approx(scores[best].tolist(), rel=1e-4)
    total = found.scores.sum(-1)
    order = sorted(range(1, len(total)), key=lambda i: -abs(total[i]))[:3]
    assert [c["name"] for c in gim["components"]] == [found.graph.writers[i] for i in order]
    for name in (
        gim["components"][0]["name"],
        gim["edges"][0]["name"],
        "logit difference 'g' - 'k'",
    ):
        assert name in out
    for name, absolute in (("curves", False), ("curves_by_size", True)):
        assert [c["method"] for c in written[name]] == ["gim", "eap", "random"]
        own = faithfulness_curve(
            local.model(head=True), ["c n o i b", "f e h i </b>"], ["c n o e b", "f e h e </b>"],
            ("g", "k"), found, tokenizer=local.tokenizer(), absolute=absolute,
        )  # fmt: skip
        assert written[name][0]["cmd"]["value"] == pytest.approx(own.cmd.value, rel=1e-4)
        area = own.cpr if name == "curves" else own.cmd
        assert str(area).split()[0] in out
    text = page.read_text()
    assert "--counterfactual &#39;c n o e b&#39;" in text and "f e h i </b>" not in text
    assert "2 prompts" in text and "“c n o i b” → “g” in letters" in text


def test_circuits_of_nodes_without_curves(command, letters_model, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code, out, err = command(
        "circuits", "--model", letters_model, "--prompt", "c n o i b", "--counterfactual",
        "c n o e b", "--compare", "atp", "--no-curve", "--out", page, "--json", numbers,
    )  # fmt: skip
    assert code == 0, err
    written = json.loads(numbers.read_text())
    assert [(c["method"], c["level"]) for c in written["circuits"]] == [
        ("gim", "node"),
        ("atp", "node"),
    ]
    assert written["curves"] == [] and "Strongest edges" not in out and "CPR" not in out
    text = page.read_text()
    assert "The circuit</h2>" not in text and "How faithful" not in text and "Stability" not in text


def test_circuits_of_a_prompt_alone_are_activation_times_gradient(
    command, letters_model, tmp_path
):  # fmt: skip
    from mikernels.circuits import gim_probe
    from mikernels.models.load import LocalModel

    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code, out, err = command(
        "circuits", "--model", letters_model, "--prompt", "c n o i b", "--k", 3, "--out", page,
        "--method", "eap", "--json", numbers,
    )  # fmt: skip
    assert code == 0, err
    local = LocalModel(letters_model)
    probe = gim_probe(
        local.model(head=True), "c n o i b", None, 3, tokenizer=local.tokenizer(), rules="plain"
    )
    written = json.loads(numbers.read_text())
    assert [c["name"] for c in written["components"]] == [c.name for c in probe.components]
    assert "edges, and faithfulness, need --counterfactual" in " ".join(out.split())
    assert "edges need --counterfactual" in page.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --prompt TEXT, or --task, one of ['ioi'"),
        (["--task", "ioi", "--prompt", "a"], "give either --prompt TEXT, or --task"),
        (["--task", "poetry"], "--task must be one of ['ioi', 'greater_than', 'induction', "),
        (["--task", "ioi", "--answer", "a"], "must be left out with --task, which brings its own"),
        (["--prompt", "a", "--wrong", "b"], "--wrong needs --answer, got none"),
        (["--prompt", "a", "--answer", "b", "--answer", "c"], "--answer must be given once, or "
         "once for each --prompt (1), got 2"),
        (["--prompt", "a", "--prompt", "b", "--counterfactual", "c"], "--counterfactual must be "
         "given once for each --prompt (2), got 1"),
        (["--prompt", "a", "--method", "eap-ig"], "--counterfactual must be given for each "
         "--prompt for edges, --compare and methods but gim and eap, got none"),
        (["--prompt", "a", "--level", "edge"], "--counterfactual must be given for each --prompt"),
        (["--task", "ioi", "--method", "acdc"], "--method must be one of ['eap', 'gim', "),
        (["--task", "ioi", "--compare", "gim"], "--compare must name other methods, got ['gim', "),
        (["--task", "ioi", "--method", "atp", "--level", "edge"], "and node for atp, got 'edge'"),
        (["--task", "ioi", "--k", "0"], "--k must be at least 1, got 0"),
        (["--task", "ioi", "--out", "no/such/folder.html"], "--out must be a file of an existing"),
        (["--task", "ioi", "--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
    ],
)  # fmt: skip
def test_circuits_refuses_before_a_model_is_read(command, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("mikernels.models.load.LocalModel.model", None)
    code, _, err = command("circuits", "--model", "no/such/model", *arguments)
    assert code == 2 and message in err and "circuits: " in err


def test_circuits_names_a_model_that_is_not_there(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for model, fix in (
        ("no/such/model", "give the path of one"),
        ("nobody/nothing", "`hf download nobody/nothing` fetches one"),
    ):
        code, _, err = command("circuits", "--model", model, "--task", "ioi")
        assert code == 2
        assert "--model must be a folder, a .gguf file, smollm2, or the id of a model" in err
        assert f"got {model}; {fix}" in err
