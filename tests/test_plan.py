"""What a run will be and cost, against the run itself; and how a budget is spent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from banks import hold
from stratagem.artifact import read_record
from stratagem.assemble import Inputs, assemble, make_objective, open_inputs, open_run
from stratagem.checkpoint import list_steps, load
from stratagem.cli import main
from stratagem.config import RunConfig, dump, parse
from stratagem.config import load as load_config
from stratagem.data.shards import DataSet
from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory.bank import MemoryBank
from stratagem.nets.cost import saved_bytes
from stratagem.programs.cost import cost_of
from stratagem.programs.plan import plan, tailored
from stratagem.programs.sample import SampleConfig
from stratagem.programs.train import train
from stratagem.stages import Stages

EDGES = (2.0, -2.0)


def curves() -> dict[str, list[float]]:
    log_snr = torch.linspace(8, -8, 100, dtype=torch.float64)
    return {"log_snr": log_snr.tolist(), "to_noise": torch.sigmoid(-log_snr).tolist()}


@pytest.fixture(scope="module")
def folder(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    made = {"data": blobs.fingerprint}
    Stages(EDGES).save(folder / "stages", {**made, "curves": curves()})
    Stages(EDGES).save(folder / "plain", made)
    store = hold(torch.rand(blobs.num, 2, 12))
    bank = MemoryBank(store, blobs.labels, blobs.held_out, {"name": "test"}, blobs.fingerprint)
    bank.save(folder / "bank")
    return folder


@pytest.fixture
def run(blobs: DataSet, folder: Path) -> RunConfig:
    return parse(
        {
            "data": str(blobs.path),
            "model": {"width": 16, "depth": 3, "heads": 2, "labels": True},
            "memory": {"bank": str(folder / "bank")},
            "stages": {"file": str(folder / "stages"), "shared": 1},
            "train": {"steps": 1, "batch_size": 12, "threads": 1, "device": "cpu"},
        }
    )


@pytest.fixture
def unet(run: RunConfig) -> RunConfig:
    body = {"width": 16, "mults": [1, 2], "blocks": 1, "attention": [4]}
    made = parse({"data": run.data, "unet": body, "stages": {"edges": [0.0]}})
    assert run.stages is not None
    return replace(made, train=run.train, stages=replace(run.stages, shared=None))


def with_budget(run: RunConfig, budget: float, **settings: object) -> RunConfig:
    assert run.stages is not None
    return replace(run, stages=replace(run.stages, budget=budget, **settings))  # type: ignore[arg-type]


def sizes(run: RunConfig) -> tuple[int, ...]:
    assert run.stages is not None
    return run.stages.depths or run.stages.widths or ()


# --- the plan is the run --------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["adamw", pytest.param("muon", marks=SLOW), pytest.param("unet", marks=SLOW)]
)
def test_the_plan_is_what_the_run_turns_out_to_be(
    kind: str, run: RunConfig, unet: RunConfig, tmp_path: Path
) -> None:
    config = unet if kind == "unet" else run
    if kind == "muon":
        config = replace(run, train=replace(run.train, optimizer="muon"))
    planned = plan(config)
    train(config, tmp_path / "run")
    assert planned.cost == cost_of(open_run(tmp_path / "run"), SampleConfig())
    saved = load(tmp_path / "run", list_steps(tmp_path / "run")[-1])
    bytes_of = {
        group: sum(t.nbytes for name, t in tensors.items() if not name.endswith(".step"))
        for group, tensors in saved.tensors.items()
    }
    assert (planned.memory.weights, planned.memory.averages) == (bytes_of["model"], bytes_of["ema"])
    assert planned.memory.weights == 4 * planned.cost.parameters
    assert planned.memory.moments == pytest.approx(bytes_of["training"], rel=0.01)
    assert planned.memory.checkpoint == pytest.approx(sum(bytes_of.values()), rel=0.01)


@pytest.mark.parametrize("setting", ["float32", pytest.param("bf16", marks=SLOW), "checkpointing"])
def test_the_estimate_of_activations_is_near_a_batch_of_the_run(
    setting: str, run: RunConfig
) -> None:
    # In bf16 a small batch, beside which copies of the weights weigh much.
    cfg = replace(run.train, batch_size=16 if setting == "bf16" else 64)
    cfg = replace(cfg, precision="bf16") if setting == "bf16" else cfg
    cfg = replace(cfg, activation_checkpointing=setting == "checkpointing")
    run = replace(run, train=cfg)
    parts = assemble(run)
    batch = parts.batches(0)
    told = {"stage": batch.stage, **batch.condition}
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
        kept = saved_bytes(parts.objective, batch.x, batch.eps, batch.t, **told)
    estimate = plan(run).memory.activations
    if setting == "checkpointing":  # planned with it, and far less than without
        assert estimate < 0.2 * kept
    else:
        assert estimate == pytest.approx(kept, rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_plan_for_a_gpu_that_is_not_here_is_in_bf16(run: RunConfig) -> None:
    def kept(**settings: Any) -> int:
        return plan(replace(run, train=replace(run.train, **settings))).memory.activations

    assert kept(device="cuda") == kept(precision="bf16") != kept()
    assert kept(device="cuda", precision="float32") == kept()


def test_activations_go_with_the_rows_of_a_pass(run: RunConfig) -> None:
    twice = replace(run, train=replace(run.train, batch_size=24, accumulate=2))
    assert plan(twice).memory == plan(run).memory


def test_a_plan_in_words_and_as_json(run: RunConfig) -> None:
    made = plan(with_budget(run, 1.0))
    text = "\n".join(made.lines())
    assert dump(made.config).strip() in text
    assert made.tailoring is not None
    assert "\n".join(made.tailoring.lines()) in text
    record = json.loads(json.dumps(made.record()))
    assert parse(record["config"]) == made.config
    assert record["cost"]["stage_macs"] == list(made.cost.stage_macs)
    assert record["tailoring"] == made.tailoring.record()
    assert record["memory"]["checkpoint"] == made.memory.checkpoint


def test_a_plan_needs_no_pixels(run: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(run.data, tmp_path / "data")
    pixels = max((tmp_path / "data").glob("*.safetensors"), key=lambda f: f.stat().st_size)
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1
    pixels.write_bytes(content)
    damaged = replace(run, data=str(tmp_path / "data"))
    inputs = open_inputs(damaged, verify=False)
    assert isinstance(inputs, Inputs)
    assert inputs.record["curves"] == curves()
    with pytest.raises(DamagedArtifact):
        open_inputs(damaged)
    assert plan(damaged).cost == plan(run).cost


def test_the_objective_is_that_of_the_run(run: RunConfig) -> None:
    inputs = open_inputs(run)
    made = make_objective(run, inputs.description, inputs.stages).state_dict()
    known = assemble(run).objective.state_dict()
    assert made.keys() == known.keys()
    assert all(torch.equal(made[name], known[name]) for name in known)


def test_a_dry_run_writes_nothing(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(dump(with_budget(run, 1.0)))
    out = tmp_path / "out"
    line = ["train", str(tmp_path / "run.yaml"), "--out", str(out)]

    def said(*flags: str) -> tuple[int, str]:
        code = main([*line, *flags])
        return code, capsys.readouterr().out

    code, text = said("--dry-run", "--json")
    record = json.loads(text)
    assert code == 0
    assert record["tailoring"]["sizes"] == record["config"]["stages"]["depths"]
    code, text = said("--dry-run", "--set", "train.batch_size=24")
    assert code == 0
    assert "batch_size: 24" in text
    assert said("--json") == (2, "")
    assert not out.exists()
    code, text = said()  # a run begins with the choice of its decoders
    assert code == 0
    assert text.startswith(f"stages.depths: {record['tailoring']['sizes']}")


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [pytest.param("draws", marks=SLOW), "calls"])
def test_the_mean_is_within_the_budget_and_near_it(run: RunConfig, measure: str) -> None:
    before = (0, 0, 0)
    for budget in (0.9, 1.0, 2.0):
        spent, why = tailored(with_budget(run, budget, measure=measure))
        assert why is not None
        assert budget - 0.3 < why.mean <= budget
        assert all(new >= old for new, old in zip(sizes(spent), before, strict=True))
        before = sizes(spent)
    assert before[0] > before[1] > before[2]
    cost, whole = plan(spent).cost, plan(replace(run, stages=None)).cost
    assert whole.mean_macs == whole.mean_macs_draws
    mean = cost.mean_macs if measure == "calls" else cost.mean_macs_draws
    assert mean / whole.mean_macs == pytest.approx(why.mean)
    assert why.relative == pytest.approx([macs / whole.mean_macs for macs in cost.stage_macs])


def test_decoders_of_a_unet_differ_in_width(unet: RunConfig) -> None:
    made = plan(with_budget(unet, 1.2))
    stages, why = made.config.stages, made.tailoring
    assert stages is not None
    assert why is not None
    assert (stages.widths, stages.depths) == (why.sizes, None)
    assert why.sizes[0] > 16 > why.sizes[2]
    assert 0.9 < why.mean <= 1.2
    assert [macs / made.cost.stage_macs[0] for macs in made.cost.stage_macs] == pytest.approx(
        [share / why.relative[0] for share in why.relative]
    )


def test_a_spent_budget_is_a_configuration_by_hand(run: RunConfig) -> None:
    spent, why = tailored(with_budget(run, 1.0, measure="calls"))
    assert why is not None
    assert why.sizes == sizes(spent)
    assert tailored(spent) == (spent, None)
    assert parse(yaml.safe_load(dump(spent))) == spent
    assert spent.model.depth == 1 + max(why.sizes)


def test_a_run_keeps_why_and_goes_on(run: RunConfig, tmp_path: Path) -> None:
    config = with_budget(run, 1.0)
    spent, why = tailored(config)
    assert why is not None
    train(config, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == spent
    meta = read_record(tmp_path / "run" / "run.json", "run").meta
    assert meta["tailoring"] == json.loads(json.dumps(why.record()))
    longer = replace(config, train=replace(config.train, steps=2))
    assert train(longer, tmp_path / "run").step == 2
    with pytest.raises(InputError, match="another run"):
        train(with_budget(run, 1.5), tmp_path / "run")


def test_what_cannot_be_spent_is_refused(run: RunConfig, unet: RunConfig, folder: Path) -> None:
    with pytest.raises(InputError, match=r"curves.*plain has none.*--method dp"):
        plan(with_budget(run, 1.0, file=str(folder / "plain")))
    with pytest.raises(InputError, match=r"curves.*stages.edges has none"):
        plan(with_budget(run, 1.0, file=None, edges=EDGES))
    with pytest.raises(InputError, match=r"stages.budget is 0.1"):
        plan(with_budget(run, 0.1))
    with pytest.raises(InputError, match=r"programs.plan.tailored"):
        assemble(with_budget(run, 1.0))
    with pytest.raises(InputError, match=r"stages.budget.*stages.depths gives by hand"):
        with_budget(run, 1.0, depths=(2, 2, 2))
    with pytest.raises(InputError, match=r"stages.budget is 0"):
        with_budget(run, 0.0)
    with pytest.raises(InputError, match=r"leave out stages.attention"):
        with_budget(unet, 1.0, attention=((4,), (4,), ()))


def test_separate_networks_have_the_same_decoders(run: RunConfig) -> None:
    spent, why = tailored(with_budget(run, 1.5))
    apart, same = tailored(with_budget(run, 1.5, form="separate"))
    assert (sizes(apart), same) == (sizes(spent), why)


def test_a_stage_that_is_never_met_cannot_be_weighed(
    run: RunConfig, folder: Path, blobs: DataSet
) -> None:
    known = curves()
    known["log_snr"][-1] = -70.0
    Stages((2.0, -60.0)).save(folder / "far", {"data": blobs.fingerprint, "curves": known})
    with pytest.raises(InputError, match=r"stage 2: it gets no draws; choose"):
        tailored(with_budget(run, 1.0, file=str(folder / "far")))
