"""`stratagem stages` from the command line: what it prints, writes, shows, and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from stratagem.cli import main
from stratagem.clustering.search import share_of_draws
from stratagem.data.shards import DataSet
from stratagem.density import LogitNormal
from stratagem.programs.cost import call_times
from stratagem.programs.sample import SampleConfig
from stratagem.schedule import VP, Linear
from stratagem.stages import Stages
from test_latents import latents_of
from test_report import Reader

QUICK = ["--samples", "16", "--times", "40"]
RUN = """
data: {data}
model: {{width: 16, depth: 2, heads: 2, patch: 4}}
diffusion: {{schedule: vp, density: uniform}}
train: {{steps: 2, batch_size: 8, warmup_steps: 1, threads: 1}}
{more}
"""


@pytest.fixture(scope="module")
def bank(blobs_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    code = main(["bank", "build", str(blobs_path), "--out", str(path), "--encoder", "pixels"])
    assert code == 0
    return path


@pytest.fixture(scope="module")
def run(blobs_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(blobs_path, tmp_path_factory.mktemp("plain"), "")


def trained(data: Path, folder: Path, more: str) -> Path:
    (folder / "run.yaml").write_text(RUN.format(data=data, more=more))
    assert main(["train", str(folder / "run.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def find(data: Path, out: Path, *words: str) -> dict:
    assert main(["stages", str(data), "--out", str(out), *words]) == 0
    return Stages.load(out)[1]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["stages", *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    return err[0]


def test_the_record_says_everything(
    blobs: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stages.json"
    record = find(blobs.path, out, *QUICK, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == {k: v for k, v in record.items() if k != "curves"}
    stages, noise = Stages.load(out)[0], Linear()
    assert [e["log_snr"] for e in record["edges"]] == list(stages.edges)
    for edge, t in zip(record["edges"], stages.times(noise), strict=True):
        at = torch.tensor(t, dtype=torch.float64)
        assert edge["t"] == t
        assert edge["sigma_over_alpha"] == pytest.approx(float(noise.sigma(at) / noise.alpha(at)))
    draws = share_of_draws(stages, LogitNormal(), noise)
    assert record["share_of_draws"] == pytest.approx(list(draws))
    times = torch.tensor(call_times(SampleConfig(), noise), dtype=torch.float64)
    index = stages.index(noise.log_snr(times))
    share = [float((index == k).double().mean()) for k in range(3)]
    assert record["share_of_calls"] == pytest.approx(share)
    assert record["data"] == blobs.fingerprint
    known = record["parameters"]
    assert known["num_images"] == 32  # 8 are held out
    assert (known["num_samples"], known["num_times"], known["seed"]) == (16, 40, 0)
    assert known["range"] == [-1, 1]
    assert (known["eta"], known["eta_unit"]) == (2, "1/255 of the noise's standard deviation")
    assert len(record["curves"]["matrix"]) == 40


def test_text_for_people(
    blobs_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--method", "dp", "--space", "x", "--images", "20", "--density", "uniform"]
    record = find(blobs_path, tmp_path / "stages.json", *QUICK, *settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/stages.json: 3 stages by dp ({tmp_path}/stages.html)"
    edges, shares = record["edges"], record["share_of_draws"]
    assert lines[1] == (
        f"  edge at log-SNR {edges[0]['log_snr']:.4f}, sigma/alpha "
        f"{edges[0]['sigma_over_alpha']:.4f}, t {edges[0]['t']:.4f}"
    )
    assert lines[3].startswith(
        f"  stage 0, t 0 to {edges[0]['t']:.3f}: {shares[0]:.1%} of training"
    )
    assert lines[5].startswith(
        f"  stage 2, t {edges[1]['t']:.3f} to 1: {shares[2]:.1%} of training"
    )
    assert lines[6] == "  draws Uniform(); calls heun, 50 steps"
    assert lines[7].endswith(
        "within 2/255 of the data's range (data from -1 to 1), 20 images, 16 draws"
    )
    assert min(shares) >= 0.05


def test_eta_in_space_x_is_a_share_of_the_range(blobs: DataSet, tmp_path: Path) -> None:
    """Pixels in [-1, 1] have the range 2: eta 2 allows 4/255, the noise end of a mean image."""
    from stratagem.clustering.optimal_denoiser import OptimalDenoiser
    from stratagem.clustering.similarity import similarity

    record = find(blobs.path, tmp_path / "s.json", *QUICK, "--method", "dp", "--space", "x")
    points = blobs.images(blobs.train_indices).double() / 127.5 - 1
    times = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    exact = similarity(
        OptimalDenoiser(points, Linear()), times, num_samples=16, eta=4 / 255, seed=0, space="x"
    )
    ours = torch.tensor(record["curves"]["to_noise"], dtype=torch.float64)
    assert (ours - exact.to_noise).abs().max() < 0.002


def test_the_page_shows_curves_matrix_and_edges(blobs_path: Path, tmp_path: Path) -> None:
    find(blobs_path, tmp_path / "stages.json", *QUICK)
    html = (tmp_path / "stages.html").read_text()
    page = Reader(html)
    assert "http" not in html.replace("http-equiv", "")
    assert not page.all("script")
    assert len(page.all("polyline")) == 2
    assert len(page.all("polygon")) == 2  # bands
    assert page.text("text").count("edge 1") == page.text("text").count("edge 2") == 1
    assert len([r for r in page.all("rect") if r.get("stroke-width")]) == 3
    assert len([r for r in page.all("rect") if "opacity" in r]) > 40**2
    assert len(page.all("tr")) == 4


def test_snippets_move_the_edges_and_both_are_told(
    blobs_path: Path, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*QUICK, "--method", "dp", "--space", "x"]
    plain = find(blobs_path, tmp_path / "plain.json", *settings)
    told = find(blobs_path, tmp_path / "told.json", *settings, "--memory", str(bank))
    text = capsys.readouterr().out
    find(blobs_path, tmp_path / "again.json", *settings, "--memory", str(bank), "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["edges"] == told["edges"]
    assert printed["edges_without_memory"] == plain["edges"]
    without = told["without_memory"]
    assert without["edges"] == plain["edges"]
    assert without["curves"] == plain["curves"]
    assert told["edges"] != plain["edges"]
    # A snippet tells of the image what noise hides: more agreement with the clean end.
    mean = {k: torch.tensor(r["curves"]["to_clean"]).mean() for k, r in (("a", told), ("b", plain))}
    assert mean["a"] > mean["b"] + 0.05
    assert 0 < told["parameters"]["temperature"] < 1
    assert told["parameters"]["memory"] == str(bank)
    moved = told["edges"][0]["log_snr"] - plain["edges"][0]["log_snr"]
    assert f"the snippets move the edges by {moved:+.2f}, " in text
    page = Reader((tmp_path / "told.html").read_text())
    assert len(page.all("polyline")) == 4
    assert len([r for r in page.all("rect") if r.get("stroke-width")]) == 6


def test_a_hot_kernel_is_no_memory(blobs_path: Path, bank: Path, tmp_path: Path) -> None:
    settings = ["--memory", str(bank), "--temperature", "1e6", "--method", "dp"]
    record = find(blobs_path, tmp_path / "s.json", *QUICK, *settings)
    assert record["edges"] == record["without_memory"]["edges"]
    assert record["parameters"]["temperature"] == 1e6


def test_gradient_takes_schedule_and_density_of_the_run(
    blobs_path: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--method", "gradient", "--run", str(run), "--times", "12", "--samples", "70"]
    record = find(blobs_path, tmp_path / "s.json", *settings)
    text = capsys.readouterr().out
    assert f"gradients of {run}, mean over 128 draws" in text  # whole batches of 64
    assert "draws Uniform()" in text
    assert record["schedule"] == "vp"
    assert record["parameters"]["step"] == 2
    affinity = torch.tensor(record["affinity"])
    assert affinity.shape == (12, 12)
    assert torch.equal(affinity, affinity.T)
    assert affinity.diagonal().allclose(torch.ones(12))
    assert affinity.abs().max() <= 1
    near, far = affinity.diagonal(1).mean(), affinity.diagonal(11).mean()
    assert near > far
    edges = Stages.load(tmp_path / "s.json")[0].times(VP())
    assert all(2 <= round(12 * (b - a)) <= 6 for a, b in zip((0, *edges), (*edges, 1), strict=True))
    assert "cosine of the gradients" in (tmp_path / "s.html").read_text()


def test_gradient_knows_what_the_network_is_told(
    blobs_path: Path, bank: Path, tmp_path: Path
) -> None:
    told = trained(blobs_path, tmp_path, f"memory: {{bank: {bank}}}")
    settings = ["--method", "gradient", "--run", str(told), "--times", "6", "--samples", "8"]
    first = find(blobs_path, tmp_path / "s.json", *settings)["affinity"]
    assert find(blobs_path, tmp_path / "s2.json", *settings)["affinity"] == first
    other = find(blobs_path, tmp_path / "s3.json", *settings, "--seed", "1")["affinity"]
    assert other != first


@pytest.mark.parametrize("method", ["snr", "uniform"])
def test_baselines_look_at_no_image(blobs_path: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "stages.json"
    record = find(blobs_path, out, "--method", method, "--num", "4", "--schedule", "vp")
    assert len(record["edges"]) == 3
    assert "curves" not in record
    assert "affinity" not in record
    assert len(Reader((tmp_path / "stages.html").read_text()).all("tr")) == 5


WRONG = {
    "--num 0": "0 stages: ask for at least 1",
    "--eta 0": "--eta 0: give a number above 0",
    "--alpha 2": "alpha = 2.0",
    "--samples 1": "--samples 1: ask for at least 2",
    "--times 2": "2 times for 3 stages",
    "--images 33": "has 32 training images, give 2 to 32",
    "--images 0": "give 2 to 32",
    "--tolerance 1": "tolerance = 1",
    "--method dp --min-mass 0.5": "give one from 0 to 0.333",
    "--method dp --alpha 0.8": "--alpha has no effect on method dp",
    "--method optimal-denoiser --min-mass 0.1": "--min-mass has no effect on method",
    "--method snr --space x": "--space has no effect on method snr",
    "--method uniform --times 50": "--times has no effect on method uniform",
    "--method gradient": "name one with --run",
    "--method gradient --run nowhere": "not a run",
    "--method gradient --run RUN --schedule vp": "--schedule has no effect on method gradient",
    "--run RUN": "--run has no effect on the default method",
    "--temperature 1": "--temperature has no effect without --memory",
    "--memory nowhere": "nowhere",
    "--memory BANK --temperature 0": "temperature = 0",
    "--density uniform --density-std 2": "have no effect on density uniform",
    "--method uniform --density log-normal --density-mean -6 --density-std 0.2": "stage 1 (t = 0.3",
    "--device nowhere": "'auto', 'cpu', 'cuda'",
    "--method kmeans": "kmeans",
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_ends_in_one_line(
    words: str,
    blobs_path: Path,
    run: Path,
    bank: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "stages.json"
    given = words.replace("RUN", str(run)).replace("BANK", str(bank)).split()
    quick = [] if re.search("snr|uniform|gradient|times", words) else ["--times", "20"]
    quick += [] if re.search("snr|uniform|samples", words) else ["--samples", "4"]
    assert WRONG[words] in refusal(capsys, str(blobs_path), "--out", str(out), *quick, *given)
    assert not out.exists()
    assert not out.with_suffix(".html").exists()


def test_nothing_is_overwritten(
    blobs_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, given in (("a.json", "a.json"), ("b.html", "b.json"), ("", "c.html")):
        if name:
            (tmp_path / name).write_text("mine")
        message = refusal(capsys, str(blobs_path), "--out", str(tmp_path / given))
        assert ("already exists" if name else "its name with .html") in message
        assert not name or (tmp_path / name).read_text() == "mine"


def test_other_data_and_staged_runs_are_refused(
    blobs_path: Path, run: Path, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    Image.new("L", (8, 8), 9).save(tmp_path / "pictures" / "a.png")
    one = tmp_path / "one"
    assert main(["prepare", str(tmp_path / "pictures"), "--out", str(one), "--size", "8"]) == 0
    out = ["--out", str(tmp_path / "x.json")]
    assert "1 training image: stages need" in refusal(capsys, str(one), *out)
    gradient = ["--method", "gradient", "--run"]
    assert "on other data" in refusal(capsys, str(one), *out, *gradient, str(run))
    find(blobs_path, tmp_path / "s.json", "--method", "uniform")
    staged = trained(blobs_path, tmp_path, f"stages: {{file: {tmp_path}/s.json, shared: 1}}")
    assert "has stages" in refusal(capsys, str(blobs_path), *out, *gradient, str(staged))
    find(blobs_path, tmp_path / "two.json", "--method", "uniform", "--num", "2")
    message = refusal(capsys, str(one), *out, "--memory", str(bank))
    assert "1 training image" in message


def test_latents_are_searched_as_the_network_sees_them(tmp_path: Path) -> None:
    latents = latents_of(tmp_path)
    found = find(latents.path, tmp_path / "l.json", "--method", "dp", *QUICK)
    pixels = find(tmp_path / "images", tmp_path / "p.json", "--method", "dp", *QUICK)
    assert found["data"] == latents.fingerprint
    means = latents.sample(
        latents.train_indices,
        torch.zeros(len(latents.train_indices), dtype=torch.bool),
        lambda: torch.zeros(len(latents.train_indices), *latents.shape),
    )
    assert found["parameters"]["range"] == pytest.approx([float(means.min()), float(means.max())])
    assert pixels["parameters"]["range"] == [-1.0, 1.0]
    bank = tmp_path / "bank.safetensors"
    words = ["bank", "build", str(tmp_path / "images"), "--out", str(bank), "--encoder", "pixels"]
    assert main(words) == 0  # made from the images, it serves their latents
    told = find(latents.path, tmp_path / "m.json", "--method", "dp", "--memory", str(bank), *QUICK)
    assert told["without_memory"]["edges"] == found["edges"]


def test_where_there_are_no_thresholds_dp_is_taken_and_said(
    blobs_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = find(blobs_path, tmp_path / "s.json", "--samples", "8", "--times", "20")
    assert record["method"] == "optimal-denoiser"
    assert "thresholds" not in record["parameters"]
    few = ["--samples", "8", "--times", "20", "--eta", "4000"]
    line = ["stages", str(blobs_path), "--out", str(tmp_path / "flat.json"), *few]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "stages by dp" in said
    assert "not by thresholds: agreement with the clean end never falls" in said
    assert main([*line[:3], str(tmp_path / "n.json"), *few, "--method", "optimal-denoiser"]) == 2
