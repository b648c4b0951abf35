"""Requests on trunks: the completions are those of one engine, also when trunks fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment
from raymoe.serving.transport.handshake import ConnectionLost
from raymoe.serving.transport.requests import RequestStream
from raymoe.serving.transport.trunk_pool import NoTrunkAvailable, TrunkPool
from raymoe.storage.artifact import Artifact
from tests.support.served import artifact
from tests.support.trunks import DIGEST, SETTINGS, OneTrunk, alone, collect, eventually, request, same, together


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("trunks"))


def test_a_request_resumes_on_a_trunk_with_the_same_kernel(served: Artifact) -> None:
    """Logits of another kernel may differ in the last bits. Without a choice, any trunk is better than none."""

    async def test() -> None:
        dying = await OneTrunk(served, after=8).start()
        other, equal = await OneTrunk(served, kernel="torch").start(), await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([dying.address])
        task = asyncio.create_task(collect(trunks, request(0, max_tokens=60)))
        await eventually(lambda: dying.delivered)
        await trunks.update([dying.address, other.address, equal.address])
        same(await task, alone(served, request(0, max_tokens=60)))
        assert equal.delivered and not other.delivered
        trunks.close()
        for trunk in (dying, other, equal):
            await trunk.close()

    together(test)


def test_completions_are_those_of_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        answers = await asyncio.gather(*(collect(trunks, request(n)) for n in range(4)))
        for n, got in enumerate(answers):
            same(got, alone(served, request(n)))
        trunks.close()
        await trunk.close()

    together(test)


@pytest.mark.parametrize("after", [1, 2, 9, 33, 60])
def test_a_trunk_failure_changes_no_completion(served: Artifact, after: int) -> None:
    async def test() -> None:
        dying, living = await OneTrunk(served, after).start(), await OneTrunk(served).start()
        resumed: list[int] = []
        trunks = TrunkPool(DIGEST, resumed=lambda: resumed.append(1))
        await trunks.update([dying.address])
        tasks = [asyncio.create_task(collect(trunks, request(n))) for n in range(4)]
        await eventually(lambda: dying.delivered >= after)
        await trunks.update([dying.address, living.address])
        for n, task in enumerate(tasks):
            same(await task, alone(served, request(n)))
        assert after < 20 or resumed
        trunks.close()
        for trunk in (dying, living):
            await trunk.close()

    together(test)


def test_requests_wait_for_a_trunk(served: Artifact) -> None:
    async def test() -> None:
        trunks = TrunkPool(DIGEST)
        task = asyncio.create_task(collect(trunks, request(0)))
        await asyncio.sleep(0)
        assert not trunks.ready and not task.done()
        trunk = await OneTrunk(served).start()
        await trunks.update([trunk.address])
        same(await task, alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_the_wait_timeout_ends_a_request(served: Artifact) -> None:
    async def test() -> None:
        with pytest.raises(NoTrunkAvailable, match="no trunk became available within 0.05 s"):
            await collect(TrunkPool(DIGEST, wait_timeout_s=0.05), request(0))
        waits = TrunkPool(DIGEST, wait_timeout_s=5, max_waiting=1)
        task = asyncio.create_task(collect(waits, request(0)))
        await asyncio.sleep(0)
        with pytest.raises(NoTrunkAvailable, match="1 requests wait"):
            await collect(waits, request(1))
        task.cancel()

    together(test)


def test_full_trunks_reject_new_requests_and_complete_the_others(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        tasks = [asyncio.create_task(collect(trunks, request(0, max_tokens=60))) for _ in range(6)]
        await eventually(lambda: trunk.engine.waiting == 2)
        with pytest.raises(QueueFull, match="4 requests are running and 2 are waiting"):
            await collect(trunks, request(1))
        another = await OneTrunk(served).start()
        await trunks.update([trunk.address, another.address])
        same(await collect(trunks, request(1)), alone(served, request(1)))
        for task in tasks:
            same(await task, alone(served, request(0, max_tokens=60)))
        trunks.close()
        for one in (trunk, another):
            await one.close()

    together(test)


def test_a_resumed_request_waits_where_a_new_one_is_rejected(served: Artifact) -> None:
    async def test() -> None:
        small = replace(SETTINGS, max_running=1, max_queued=0)
        dying = await OneTrunk(served, after=12).start()
        busy = await OneTrunk(served, settings=small).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([busy.address])
        occupied = asyncio.create_task(collect(trunks, request(0, max_tokens=80)))
        await eventually(lambda: busy.engine.running == 1)
        await trunks.update([busy.address, dying.address])
        same(await collect(trunks, request(1)), alone(served, request(1)))
        await occupied
        trunks.close()
        for one in (dying, busy):
            await one.close()

    together(test)


def test_an_accepted_request_is_not_rejected_for_want_of_room(served: Artifact) -> None:
    """Neither while there is no trunk nor by a full one, whether or not it has tokens."""

    async def test() -> None:
        one = replace(SETTINGS, max_running=1)
        dying = await OneTrunk(served, settings=one).start()
        trunks = TrunkPool(DIGEST, max_waiting=0)
        await trunks.update([dying.address])
        tasks = [asyncio.create_task(collect(trunks, request(0, max_tokens=100))) for _ in range(3)]
        await eventually(lambda: dying.engine.waiting == 2 and dying.delivered)
        dying.die()
        await eventually(lambda: not trunks.ready)
        with pytest.raises(NoTrunkAvailable, match="3 requests wait"):
            await collect(trunks, request(1))
        busy = await OneTrunk(served, settings=replace(one, max_queued=0)).start()
        await trunks.update([busy.address])
        for task in tasks:
            same(await task, alone(served, request(0, max_tokens=100)))
        trunks.close()
        for trunk in (dying, busy):
            await trunk.close()

    together(test)


def test_a_trunk_that_is_no_longer_listed_gets_no_new_requests(served: Artifact) -> None:
    async def test() -> None:
        ending, staying = await OneTrunk(served).start(), await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([ending.address])
        first = asyncio.create_task(collect(trunks, request(0, max_tokens=60)))
        await eventually(lambda: ending.engine.running == 1)
        await trunks.update([staying.address])
        rest = [asyncio.create_task(collect(trunks, request(0))) for _ in range(4)]
        for task in rest:
            same(await task, alone(served, request(0)))
        assert set(ending.engine.keys) <= {(1, 1)} and staying.delivered == 4 * 24
        same(await first, alone(served, request(0, max_tokens=60)))
        await trunks.update([])  # an ending trunk is better than none
        same(await collect(trunks, request(1)), alone(served, request(1)))
        trunks.close()
        for trunk in (ending, staying):
            await trunk.close()

    together(test)


def test_requests_of_a_trunk_with_a_failed_engine_resume_elsewhere(
    served: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_S", 0.02)
        broken, living = await OneTrunk(served).start(), await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([broken.address])
        step, steps = broken.engine.step, iter(range(5))

        def fail() -> list[Increment]:
            if next(steps, None) is None:
                raise OSError("the artifact is gone")
            return step()

        broken.engine.step = fail  # type: ignore[method-assign]
        task = asyncio.create_task(collect(trunks, request(0)))
        await eventually(lambda: broken.engine_thread.failed)
        await trunks.update([broken.address, living.address])
        same(await task, alone(served, request(0)))
        with pytest.raises(ConnectionLost, match="engine has failed"):
            await RequestStream.connect(broken.address, DIGEST, 5)
        trunks.close()
        for trunk in (broken, living):
            await trunk.close()

    together(test)


def test_a_request_that_kills_trunks_is_aborted(served: Artifact) -> None:
    async def test() -> None:
        made = [await OneTrunk(served, after=1).start() for _ in range(6)]
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address for trunk in made])
        with pytest.raises(NoTrunkAvailable, match="5 trunks failed"):
            await collect(trunks, request(0))
        assert len(trunks._live()) == 1
        trunks.close()
        for trunk in made:
            await trunk.close()

    together(test)


def test_a_request_that_can_never_be_served_is_rejected(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        with pytest.raises(ValueError, match="at most 128"):
            await collect(trunks, request(0, max_tokens=1000))
        await eventually(lambda: trunk.engine_thread.idle)
        trunks.close()
        await trunk.close()

    together(test)


def test_leaving_the_iteration_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        async with aclosing(trunks.generate(request(0, max_tokens=100))) as answer:
            async for _ in answer:
                break
        await eventually(lambda: trunk.engine_thread.idle)
        task = asyncio.create_task(collect(trunks, request(0, max_tokens=100)))
        await eventually(lambda: not trunk.engine_thread.idle)
        task.cancel()
        await eventually(lambda: trunk.engine_thread.idle)
        assert trunk.delivered < 150 and trunk.engine.cache.free == trunk.engine.cache.capacity
        trunks.close()
        await trunk.close()

    together(test)
