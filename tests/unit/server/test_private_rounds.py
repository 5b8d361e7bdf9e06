"""[privacy] in a run: what one client can do at most, what is written, what is refused, the same bits after a resume."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.config import PrivacySettings, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import UserError
from ubsmoe.messages import Reply, Task, Update
from ubsmoe.methods.method import Contribution
from ubsmoe.methods.sums import delta_of, private_vector
from ubsmoe.plan.tiers import run_costs
from ubsmoe.server.federation import build_federation
from ubsmoe.server.privacy import noisy_mean, spent
from ubsmoe.server.run import run
from ubsmoe.server.start import sample_clients, start_state
from ubsmoe.storage.runfolder import RunFolder, read_adapter
from ubsmoe.wire.form import UpdateSpec, spec_of

A = "layers.0.up.A"
SENT = {A: torch.full((2, 3), 1.0), "phi": torch.zeros(1, 2)}
COUNTS = torch.tensor([[10, 10]])
SPEC = UpdateSpec(spec_of({A: SENT[A]}), spec_of({"phi": SENT["phi"]}), (COUNTS.shape, COUNTS.dtype))
SETTINGS = PrivacySettings(noise_multiplier=1e-9, clip_norm=3.0)


def update(by: float, counts: torch.Tensor = COUNTS, phi: float = 0.0) -> Update:
    adapters, extras = {A: SENT[A] + by}, {"phi": torch.full((1, 2), phi)}
    return Update("a", 3, 5, adapters, counts, 10, 20, 1.0, 1.0, extras)


def mean(updates: list[Update], settings: PrivacySettings = SETTINGS, wanted: int = 4) -> Contribution:
    vectors = [private_vector(update, SENT, settings.clip_norm) for update in updates]
    return noisy_mean(vectors, SENT, SPEC, settings, wanted, 2.0, ("a", 3))


def test_without_noise_and_clipping_it_is_the_sum_over_the_clients_wanted() -> None:
    """By hand: weights moved by 0.5 and 0.3, phi by 0.4 once, over four clients; use .75 / .25 once is 1/4 of 1/4 away."""
    one = mean([update(0.5, torch.tensor([[15, 5]])), update(0.3, phi=0.4)])
    torch.testing.assert_close(one.adapters[A], torch.full((2, 3), 1.2))
    torch.testing.assert_close(one.extras["phi"], torch.full((1, 2), 0.1))
    share = one.expert_tokens / one.assignments
    torch.testing.assert_close(share, torch.tensor([[0.5625, 0.4375]]).double(), rtol=1e-5, atol=1e-5)
    assert one.assignments == 2 * one.tokens and one.loss is None and one.weight == 1 and one.client == ""


@pytest.mark.parametrize("lie", [update(1e6), update(0.0, phi=-1e6), update(5.0, torch.tensor([[20, 0]]), phi=3.0)])
def test_one_client_moves_the_sum_by_the_clip_norm_at_most(lie: Update) -> None:
    others = [update(0.1), update(-0.2)]
    without, with_lie = mean(others), mean([*others, lie])
    use = (
        3.0 * 2**0.5 * (with_lie.expert_tokens - without.expert_tokens) / without.assignments
    )  # as maths/privacy.py scales it
    moved = [with_lie.adapters[A] - without.adapters[A], with_lie.extras["phi"] - without.extras["phi"], use]
    assert float(torch.cat([part.flatten() for part in moved]).norm()) <= 3.0 / 4 * (1 + 1e-4)


def test_noise_reaches_every_number_even_if_nobody_answers() -> None:
    one = mean([], PrivacySettings(noise_multiplier=2.0, clip_norm=3.0))
    assert (one.adapters[A] != SENT[A]).all() and (one.extras["phi"] != 0).all()
    assert (one.expert_tokens[:, 0] != one.expert_tokens[:, 1]).all()


PRIVATE = {
    "privacy.noise_multiplier": 0.5,
    "privacy.clip_norm": 1.0,
    "clients.per_round": 2,
    "clients.sampling": "poisson",
    "rounds.quorum": 0.0,
    "train.rounds": 3,
    "train.local_steps": 1,
    "evaluate.before": False,
    "evaluate.after": False,
}


def carry_out(settings: Any, folder: Path, stop_in: int = 0) -> dict[str, Any]:
    federation = build_federation(settings)

    def report(event: str, number: int, fields: dict[str, Any]) -> None:
        if (event, number) == ("round", stop_in):
            raise KeyboardInterrupt

    with RunFolder.open_or_create(folder, to_json(settings)) as opened:
        return run(federation, opened, LocalEngine(federation.trainer, federation.examples, federation.clients), report)


def test_a_private_run_tells_epsilon_and_no_clients_numbers_and_resumes_to_the_same_bits(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings = parse_run(with_overrides(tiny_run, PRIVATE | {"privacy.seed": 5}))
    whole = carry_out(settings, tmp_path / "whole")
    events = [json.loads(line) for line in (tmp_path / "whole/events.jsonl").read_text().splitlines()]
    costs = [event["epsilon"] for event in events if event["event"] == "round"]
    assert len(costs) == 3 and costs == sorted(costs) and costs[-1] == whole["privacy"]["epsilon"] > costs[0] > 0
    clients = [event for event in events if event["event"] == "client"]
    private = {"loss", "tokens", "assignments", "upload_bytes", "steps"}
    assert clients and not private & {key for event in clients for key in event}
    assert [event["loss"] for event in events if event["event"] == "round"] == [None] * 3

    with pytest.raises(KeyboardInterrupt):
        carry_out(settings, tmp_path / "stopped", stop_in=2)
    resumed = carry_out(settings, tmp_path / "stopped")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["privacy"]["epsilon"] == spent(settings, 4)["epsilon"] > whole["privacy"]["epsilon"]


def lost_newest(folder: Path) -> None:
    """The newest checkpoint is gone: the disk lost it, or somebody put an older copy of the folder back."""
    shutil.rmtree(max((folder / "checkpoints").iterdir()))


def model_of(folder: Path) -> torch.Tensor:
    adapter, _ = read_adapter(folder)
    return torch.cat(
        [value.double().flatten() for name, value in sorted(adapter.items()) if name.startswith("layers.")]
    )


@pytest.mark.parametrize("seed", [None, 5])
def test_a_round_that_is_run_again_with_another_client_does_not_lay_that_client_bare(
    seed: int | None, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Under the same noise the difference of the two models is one client's clipped change: cosine 1 (faults2.md, B1)."""
    whole = {"clients.per_round": 4, "clients.sampling": "fixed", "train.rounds": 1, "privacy.noise_multiplier": 3.0}
    federation = build_federation(parse_run(with_overrides(tiny_run, PRIVATE | whole | {"privacy.seed": seed})))
    settings, spied = federation.settings, list[Update]()

    def round_with(clients: int) -> torch.Tensor:
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
        exchange = engine.exchange

        def without_the_last(tasks: Iterable[Task]) -> Iterator[Reply]:
            spied[:] = exchange(tasks)  # type: ignore[assignment]
            yield from spied[:clients]

        engine.exchange = without_the_last  # type: ignore[method-assign]
        with RunFolder.open_or_create(tmp_path / "run", to_json(settings)) as opened:
            run(federation, opened, engine, lambda *_: None)
        return model_of(tmp_path / "run")

    all_four = round_with(4)
    lost_newest(tmp_path / "run")
    difference = all_four - round_with(3)
    sent = federation.method.dispatch(start_state(federation), federation.tiers[0])
    delta = delta_of(spied[3], sent)
    bare = torch.cat([delta[name].flatten() for name in sorted(delta) if name.startswith("layers.")])
    cosine = float(torch.nn.functional.cosine_similarity(difference, bare, dim=0))
    assert abs(cosine) < 5 / len(bare) ** 0.5, "the difference points along the client's change"


def test_every_attempt_is_noted_before_anybody_is_asked_and_epsilon_counts_every_model_that_went_out(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings, folder = parse_run(with_overrides(tiny_run, PRIVATE | {"train.rounds": 2})), tmp_path / "run"
    first = carry_out(settings, folder)
    lost_newest(folder)
    again = carry_out(settings, folder)
    assert again["adapter_sha256"] != first["adapter_sha256"]
    assert again["privacy"]["epsilon"] == spent(settings, 3)["epsilon"] > first["privacy"]["epsilon"]
    notes = [json.loads(line) for line in (folder / "releases.jsonl").read_text().splitlines()]
    assert [(note["event"], note["round"]) for note in notes] == [
        *[(event, number) for number in (1, 2, 2) for event in ("attempt", "released")]
    ]
    salts = [note["salt_sha256"] for note in notes if note["event"] == "attempt"]
    assert len(set(salts)) == 3


def test_no_secret_of_the_noise_is_on_the_disk_and_the_notes_are_the_owners_alone(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "5ec7e7" * 10
    monkeypatch.setattr("ubsmoe.storage.releases.secrets.token_hex", lambda _: secret)
    before = os.umask(0o022)
    try:
        carry_out(parse_run(with_overrides(tiny_run, PRIVATE | {"train.rounds": 1})), tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert (tmp_path / "run" / "releases.jsonl").stat().st_mode & 0o077 == 0


def test_a_private_run_whose_notes_are_gone_or_torn_does_not_go_on_with_a_wrong_epsilon(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings, folder = parse_run(with_overrides(tiny_run, PRIVATE | {"train.rounds": 2})), tmp_path / "run"
    carry_out(settings, folder)
    notes = (folder / "releases.jsonl").read_bytes()
    (folder / "releases.jsonl").write_bytes(b"[" * 100_000 + b"\n" + notes)
    with pytest.raises(UserError, match=r"releases\.jsonl, line 1: not JSON"):
        carry_out(settings, folder)
    (folder / "releases.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no entry of round 1, .*how much privacy was spent cannot be said"):
        carry_out(settings, folder)
    (folder / "releases.jsonl").write_bytes(
        notes + b'{"event": "relea'
    )  # torn by a power cut: before anything went out
    assert carry_out(settings, folder)["privacy"]["epsilon"] == spent(settings, 2)["epsilon"]


def test_two_different_sums_never_have_the_same_noise_and_the_same_sum_has_it_again() -> None:
    settings = PrivacySettings(noise_multiplier=2.0, clip_norm=3.0)
    one, again, other = mean([update(0.1)], settings), mean([update(0.1)], settings), mean([update(0.2)], settings)
    assert torch.equal(one.adapters[A], again.adapters[A])
    moved = other.adapters[A] - one.adapters[A]
    assert (moved - moved.mean()).abs().max() > 0.01, "the difference is the bare change, the same in every entry"


def test_poisson_draws_vary_in_number_and_have_the_mean_asked_for(tiny_run: dict[str, Any]) -> None:
    federation = build_federation(parse_run(with_overrides(tiny_run, PRIVATE)))
    sizes = [len(sample_clients(federation.clients, federation.settings, number)) for number in range(400)]
    assert set(sizes) == {0, 1, 2, 3, 4} and sum(sizes) / 400 == pytest.approx(2.0, abs=0.2)


def test_who_is_drawn_is_as_secret_as_the_noise_and_as_likely_as_epsilon_says(tiny_run: dict[str, Any]) -> None:
    federation = build_federation(parse_run(with_overrides(tiny_run, PRIVATE)))

    def drawn(noise: str) -> list[list[str]]:
        draws = (sample_clients(federation.clients, federation.settings, number, noise) for number in range(20))
        return [[one.client for one in draw] for draw in draws]

    assert drawn("a") == drawn("a") != drawn("b") != drawn("")
    # with half of the configured clients there, each is drawn as often as with all of them
    half = federation.clients[:2]
    assert sum(len(sample_clients(half, federation.settings, number)) for number in range(400)) / 400 == pytest.approx(
        1.0, abs=0.15
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"method.name": "flora"},
            r"\[privacy\] cannot be combined with method flora: it needs each client's own factors",
        ),
        ({"method.name": "a3smoe"}, r"cannot be combined with method a3smoe: it weighs each client by its own use"),
        (
            {"method.averaging.rule": "activation"},
            r"cannot be combined with method ubsmoe: it weighs each client by its own use",
        ),
        ({"robust.rule": "median"}, r"\[privacy\] bounds what one client can do to a mean"),
        ({"clients.per_round": None}, 'sampling "poisson" draws clients.per_round clients on average; set that'),
        ({"privacy.noise_multiplier": 0.0}, "privacy.noise_multiplier: .*greater than 0"),
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.clip_norm: Field required"),
    ],
)
def test_what_cannot_be_private_is_refused(changes: dict[str, Any], sentence: str, tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=sentence):
        run_costs(parse_run(with_overrides(tiny_run, {**PRIVATE, **changes})))


def test_without_the_accountant_the_extra_is_named(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubsmoe.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'this needs dp_accounting: pip install "ubsmoe\[dp\]"'):
        run_costs(parse_run(with_overrides(tiny_run, PRIVATE)))
