"""The replay buffer against a deque."""

from collections import deque

import pytest
import torch
from helpers_model import CPU, A, S, random_batch, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import mbpo
import sac

quick = settings(max_examples=60, deadline=None, derandomize=True)
fillings = st.integers(1, 9).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(0, capacity), max_size=8))
)


def add(buffer, model: deque, numbers: range) -> None:
    """Adds rows to a buffer and to its model; every row holds its own number."""
    model.extend(numbers)
    rows = torch.tensor(numbers, dtype=torch.float32)[:, None]
    buffer.add(rows.expand(-1, buffer.rows.shape[1]))


def fill(capacity: int, sizes: list[int]) -> tuple:
    """A buffer and its model after adds of these sizes."""
    buffer, model = mbpo.ReplayBuffer(capacity, S, A, CPU), deque(maxlen=capacity)
    buffer.rows.fill_(torch.nan)  # what is not yet written
    for size in sizes:
        add(buffer, model, range(buffer.added, buffer.added + size))
    return buffer, model


@quick
@given(filling=fillings, share=st.fractions(0, 1))
def test_buffer_holds_the_newest_transitions(filling, share):
    """It holds what a deque of its capacity holds, rows stay whole, `newest` is in order of age."""
    capacity, sizes = filling
    buffer, model = fill(capacity, sizes)
    stored = buffer.rows[: len(buffer)]
    assert buffer.rows.shape == (capacity, 2 * S + A + 2)
    assert (len(buffer), buffer.added) == (len(model), sum(sizes))
    assert (stored == stored[:, :1]).all()
    assert sorted(stored[:, 0].tolist()) == list(model)
    n = int(share * len(model))
    assert buffer.newest(n)[:, 0].tolist() == list(model)[len(model) - n :]


@pytest.mark.parametrize(("sizes", "stored"), [([5], range(5)), ([8, 3], range(3, 11))])
def test_sample_is_uniform_over_what_is_stored(sizes, stored):
    """Every stored row is drawn equally often, to 5 standard deviations, and nothing else."""
    buffer, _ = fill(8, sizes)
    rows = buffer.sample(20, 4000, generator=seeded())
    assert rows.shape == (20, 4000, 2 * S + A + 2)
    numbers, counts = rows[..., 0].unique(return_counts=True)
    assert numbers.tolist() == list(stored)
    n = len(stored)
    assert (counts - 80_000 / n).abs().max() < 5 * (80_000 * 1 / n * (1 - 1 / n)) ** 0.5


def test_unpack_takes_a_row_apart_as_it_was_put_together():
    """A row is s, a, r, s', terminated; r and terminated lose their dimension."""
    batch = random_batch(2, 4)
    parts = [batch.obs, batch.action, batch.reward[..., None], batch.next_obs]
    rows = torch.cat([*parts, batch.terminated[..., None]], -1)
    unpacked = sac.ReplayBuffer(1, S, A, CPU).unpack(rows)
    assert unpacked._fields == ("obs", "action", "reward", "next_obs", "terminated")
    assert all(torch.equal(x, y) for x, y in zip(unpacked, batch, strict=True))


@quick
@given(filling=fillings, capacity=st.integers(1, 12), later=st.lists(st.integers(0, 3), max_size=6))
def test_resized_or_loaded_buffer_goes_on_as_a_deque_does(filling, capacity, later):
    """Both hold the newest, and later adds go over the oldest first; a state is a copy."""
    buffer, model = fill(*filling)
    resized, loaded = mbpo.resized(buffer, capacity), fill(filling[0], [1])[0]
    assert resized.newest(len(resized))[:, 0].tolist() == list(deque(model, maxlen=capacity))
    state = buffer.state()
    buffer.rows.fill_(-1)
    loaded.load(state)
    assert (len(loaded), loaded.added) == (len(model), sum(filling[1]))
    for new, size in ((resized, capacity), (loaded, filling[0])):
        kept, number = deque(model, maxlen=size), sum(filling[1])
        for count in later:
            add(new, kept, range(number, number := number + min(count, size)))
            assert new.newest(len(new))[:, 0].tolist() == list(kept)


def test_buffer_larger_than_memory_is_refused(monkeypatch):
    """One transition of 4 (2S + A + 2) bytes more than a memory of 1 GiB is an InputError."""
    monkeypatch.setattr(sac.os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**18}.get)
    most = 2**30 // (4 * (2 * S + A + 2))
    sac.check_memory(most, S, A, CPU)
    with pytest.raises(sac.InputError, match=r"need \d GiB, \d GiB exist"):
        sac.check_memory(most + 1, S, A, CPU)
