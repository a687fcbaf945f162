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


def fill(capacity: int, sizes: list[int]) -> tuple:
    """A buffer and its model after adds of these sizes; every row holds its own number."""
    buffer, model, number = sac.ReplayBuffer(capacity, S, A, CPU), deque(maxlen=capacity), 0
    for size in sizes:
        number = add(buffer, model, number, size)
    return buffer, model


def add(buffer, model: deque, number: int, size: int) -> int:
    """Adds rows `number` and on to both; returns the number that comes next."""
    fresh = list(range(number, number + size))
    model.extend(fresh)
    width = buffer.rows.shape[1]
    buffer.add(torch.tensor(fresh, dtype=torch.float32)[:, None].expand(-1, width))
    return number + size


@quick
@given(filling=fillings)
def test_buffer_holds_the_newest_transitions(filling):
    """It holds what a deque of its capacity holds, and each row stays whole."""
    capacity, sizes = filling
    buffer, model = fill(capacity, sizes)
    stored = buffer.rows[: len(buffer)]
    assert buffer.rows.shape == (capacity, 2 * S + A + 2)
    assert (len(buffer), buffer.added) == (len(model), sum(sizes))
    assert (stored == stored[:, :1]).all()
    assert sorted(stored[:, 0].tolist()) == list(model)


@quick
@given(filling=fillings)
def test_sample_draws_all_stored_rows_and_no_others(filling):
    """Many draws meet every stored transition; memory not yet written is never drawn."""
    capacity, sizes = filling
    buffer, model = fill(capacity, [*sizes, 1])
    buffer.rows[len(buffer) :] = torch.nan
    rows = buffer.sample(20, 15, draw=seeded())
    assert rows.shape == (20, 15, 2 * S + A + 2)
    assert set(rows[..., 0].flatten().tolist()) == set(model)


def test_sample_is_uniform():
    """Every stored row is drawn equally often, to 5 standard deviations."""
    buffer, _ = fill(8, [8])
    counts = buffer.sample(80_000, draw=seeded())[:, 0].long().bincount(minlength=8)
    assert (counts - 10_000).abs().max() < 5 * (80_000 * 1 / 8 * 7 / 8) ** 0.5


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_unpack_takes_a_row_apart_as_it_was_put_together(shape):
    """A row is s, a, r, s', terminated; r and terminated lose their dimension."""
    batch = random_batch(*shape)
    parts = [batch.obs, batch.action, batch.reward[..., None], batch.next_obs]
    rows = torch.cat([*parts, batch.terminated[..., None]], -1)
    unpacked = sac.ReplayBuffer(1, S, A, CPU).unpack(rows)
    assert unpacked._fields == ("obs", "action", "reward", "next_obs", "terminated")
    assert all(torch.equal(x, y) for x, y in zip(unpacked, batch, strict=True))


@quick
@given(filling=fillings, capacity=st.integers(1, 12), later=st.lists(st.integers(0, 3), max_size=6))
def test_resized_keeps_the_newest_in_order_of_age(filling, capacity, later):
    """Grown or shrunk, it holds the newest by age, and later adds go over the oldest first."""
    buffer, model = fill(*filling)
    new, kept = mbpo.resized(buffer, capacity), deque(model, maxlen=capacity)
    assert len(new.rows) == capacity
    assert new.rows[: len(new), 0].tolist() == list(kept)
    number = sum(filling[1])
    for size in later:
        number = add(new, kept, number, min(size, capacity))
        assert sorted(new.rows[: len(new), 0].tolist()) == list(kept)


def test_buffer_larger_than_memory_is_refused(monkeypatch):
    """One transition of 4 (2S + A + 2) bytes more than a memory of 1 GiB is an InputError."""
    monkeypatch.setattr(sac.os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**18}.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**29))
    most = 2**30 // (4 * (2 * S + A + 2))
    assert len(sac.ReplayBuffer(most, S, A, CPU).rows) == most
    for device, capacity in [("cpu", most + 1), ("cuda", most // 2 + 1)]:  # of a GPU: its own
        with pytest.raises(sac.InputError, match=r"need \d GiB, \d GiB exist"):
            sac.ReplayBuffer(capacity, S, A, torch.device(device))
