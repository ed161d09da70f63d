"""A random walk through the lives of many jobs, checked against a model of ten lines.

Workers claim, beat, freeze, come back as zombies, deliver, fail and hand back; owners submit, cancel, hang up and come
back; the reaper runs whenever it likes. After every step the database must agree with the model.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy import text

from impasto.jobs import store as store_module
from impasto.jobs.database import open_database, reading, upgrade
from impasto.jobs.keys import KeyStore
from impasto.jobs.records import Job, Lease, NewJob, Output
from impasto.jobs.states import TERMINAL, Status, check_move
from impasto.jobs.store import JobStore
from tests.postgres import drop_database, new_database

MAX_ATTEMPTS = 3
WORKERS = ("ann", "ben", "cid")
FRESH, EXPIRED = 1000.0, -1.0  # seconds of lease: far from over, over at once
USUAL = store_module.REJOIN_SECONDS
LONG, OVER = 3600.0, 0.0  # seconds within which a client that hung up may come back
# Other events name the status.
STATUS_AFTER = {"created": "created", "withdrawn": "created", "started": "processing", "requeued": "created"}

workers = st.sampled_from(WORKERS)
lease_seconds = st.sampled_from([FRESH, FRESH, EXPIRED])


@dataclass
class Model:
    """What we believe of one job."""

    key: int = 0
    body: str | None = None  # of the request that made it
    holders: int = 0  # clients that wait for its end
    dropped: bool = False  # the last of them hung up
    withdrawn: bool = False  # no worker is to take it
    begun: bool = False  # a worker had it once
    status: Status = Status.CREATED
    lease: Lease | None = None  # of the worker that holds it
    worker: str = ""
    expired: bool = False
    stopping: bool = False  # its owner has cancelled it
    deaths: int = 0
    delivered: str | None = None  # the picture that was accepted

    @property
    def waits(self) -> bool:
        """Whether a worker may take it."""
        return self.status == Status.CREATED and not self.withdrawn

    def end(self, status: Status) -> None:
        """The job is held no more; a cancelled one cannot end otherwise."""
        self.status = Status.CANCELLED if self.stopping else status
        self.lease = None


@dataclass
class Believed:
    """All jobs we were told were accepted, and how the ended ones looked."""

    jobs: dict[str, Model] = field(default_factory=dict)
    ended: dict[str, Job] = field(default_factory=dict)
    outcomes: dict[Lease, str] = field(default_factory=dict)  # what a worker was told its attempt came to

    def holder(self, lease: Lease) -> Model | None:
        """The job that this lease still holds, if any."""
        model = self.jobs[lease.id]
        return model if model.lease == lease else None


class JobMachine(RuleBasedStateMachine):
    """Every method of the store in any order; ``leases`` keeps the dead ones too, for the zombies."""

    jobs = Bundle("jobs")
    leases = Bundle("leases")
    new_url: Callable[[str], str]  # of an upgraded, empty database; may use the folder
    drop: Callable[[str], object]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.url = type(self).new_url(self.folder.name)
        self.engine = open_database(self.url)
        self.store = JobStore(self.engine)
        self.believed = Believed()
        store_module.REJOIN_SECONDS = LONG

    @initialize()
    def make_keys(self) -> None:
        keys = KeyStore(self.engine)
        self.keys = [keys.authenticate(keys.create(name)).id for name in ("alice", "bob")]

    @rule(target=jobs, key=st.integers(0, 1), priority=st.integers(0, 1), cost=st.sampled_from([1.0, 8.0]))
    def submit(self, key: int, priority: int, cost: float) -> str:
        new = NewJob("fake", {}, self.keys[key], seed=1, cost=cost, priority=priority, lora_key=("x",) * key)
        job = self.store.create(new, max_queued=100)
        self.believed.jobs[job.id] = Model(key)
        return job.id

    @rule(target=jobs, key=st.integers(0, 1), body=st.sampled_from("ab"), held=st.booleans())
    def submit_again(self, key: int, body: str, held: bool):
        """A request whose client hung up gets that job back, if it is not over; any other is a new wish."""
        there = {
            id
            for id, model in self.believed.jobs.items()
            if (model.key, model.body) == (key, body) and model.dropped and not model.stopping
            if model.status in (Status.CREATED, Status.PROCESSING, Status.COMPLETED)
        }
        new = NewJob("fake", {}, self.keys[key], seed=1, body_hash=body, held=held)
        id = self.store.create(new, max_queued=100).id
        if not there:
            assert id not in self.believed.jobs
            self.believed.jobs[id] = Model(key, body, int(held))
            return id
        assert id in there
        model = self.believed.jobs[id]
        model.dropped = model.withdrawn = False
        model.holders += held
        return multiple()

    @rule(id=jobs, withdraw=st.booleans())
    def hang_up(self, id: str, withdraw: bool) -> None:
        """A job that nobody holds any more and no worker has begun is withdrawn; all others go on."""
        model = self.believed.jobs[id]
        if model.status in (Status.CREATED, Status.PROCESSING, Status.COMPLETED):
            last = model.holders <= 1
            model.withdrawn |= withdraw and last and model.status == Status.CREATED and not model.begun
            model.dropped |= last
            model.holders = max(0, model.holders - 1)
            assert self.store.drop(id, withdraw=withdraw) == model.withdrawn
        else:
            assert not self.store.drop(id, withdraw=withdraw)

    @rule(target=leases, worker=workers, n=st.integers(1, 3), seconds=lease_seconds)
    def claim(self, worker: str, n: int, seconds: float):
        """As many jobs as wait and fit go out, each waiting until now, under a number never seen before."""
        waiting = {id for id, model in self.believed.jobs.items() if model.waits}
        claimed = self.store.claim(worker, n, seconds, loaded=["x"])
        assert len(claimed) == min(n, len(waiting))
        assert {job.id for job in claimed} <= waiting
        for job in claimed:
            model = self.believed.jobs[job.id]
            model.status, model.lease, model.worker = Status.PROCESSING, job.lease, worker
            model.begun = True
            model.expired = seconds == EXPIRED
        return multiple(*(job.lease for job in claimed))

    @rule(worker=workers, held=st.lists(leases, max_size=4, unique=True), seconds=lease_seconds)
    def heartbeat(self, worker: str, held: list[Lease], seconds: float) -> None:
        """A worker hears exactly which of the leases it names are lost and which jobs were cancelled."""
        lost, cancelled = set(), set()
        for lease in held:
            model = self.believed.holder(lease)
            if model is None or model.worker != worker:
                lost.add(lease)
            elif model.stopping:
                cancelled.add(lease)
                model.end(Status.CANCELLED)
            else:
                model.expired = seconds == EXPIRED
        beat = self.store.heartbeat(worker, {lease: {"step": 1} for lease in held}, seconds)
        assert (beat.lost, beat.cancelled) == (lost, cancelled)

    @rule(lease=leases)
    def complete(self, lease: Lease) -> None:
        """A delivery counts if the lease is the living one and nobody cancelled."""
        blob = f"{lease.id}/{lease.attempt}"
        picture = Output(blob, "image/png", 8, 8, nsfw=False, seed=1)
        if self.tell(lease, self.store.complete(lease, [picture], {"total": 1}), Status.COMPLETED):
            self.believed.jobs[lease.id].delivered = blob

    @rule(lease=leases)
    def fail(self, lease: Lease) -> None:
        self.tell(lease, self.store.fail(lease, "broken", "test"), Status.FAILED)

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.tell(lease, self.store.release(lease), Status.CREATED)

    def tell(self, lease: Lease, answer: bool, status: Status) -> bool:
        """A worker's last word counts if its lease lives and nobody cancelled; repeated, it gets the same answer.

        Returns:
            Whether it counted, this time.
        """
        model = self.believed.holder(lease)
        if model is None:
            assert answer == (self.believed.outcomes.get(lease) == status)
            return False
        assert answer != model.stopping
        model.end(status)
        if answer:
            self.believed.outcomes[lease] = status
        return answer

    @rule(id=jobs)
    def cancel(self, id: str) -> None:
        """A waiting job ends, a held one is marked, an ended one stays."""
        model = self.believed.jobs[id]
        owner = self.store.get(id).key_id
        if model.status == Status.CREATED:
            model.status = Status.CANCELLED
        model.stopping = model.stopping or model.status == Status.PROCESSING
        assert self.store.cancel(id, owner).status == model.status

    @rule(window=st.sampled_from([LONG, OVER]))
    def reap(self, window: float) -> None:
        """The reaper takes every job whose lease is over, ends what nobody came back to, and touches no other."""
        store_module.REJOIN_SECONDS = window
        overdue = {id for id, model in self.believed.jobs.items() if model.lease and model.expired}
        assert set(self.store.reap(MAX_ATTEMPTS)) == overdue
        store_module.REJOIN_SECONDS = LONG
        for model in self.believed.jobs.values() if window == OVER else ():
            if model.status == Status.CREATED and model.withdrawn:
                model.status = Status.CANCELLED
        for id in overdue:
            model = self.believed.jobs[id]
            model.deaths += not model.stopping
            model.end(Status.FAILED if model.deaths >= MAX_ATTEMPTS else Status.CREATED)

    @invariant()
    def every_job_is_where_we_believe(self) -> None:
        """None lost, none invented, and a picture is visible if and only if its delivery was accepted."""
        with reading(self.engine) as db:
            ids = {row.id for row in db.execute(text("select id from predictions"))}
        assert ids == set(self.believed.jobs)
        for id, model in self.believed.jobs.items():
            job = self.store.get(id)
            assert job.status == model.status
            assert [output.blob for output in job.outputs] == ([model.delivered] if model.delivered else [])
            if job.status in TERMINAL:
                assert self.believed.ended.setdefault(id, job) == job, "an ended job changed"

    @invariant()
    def every_history_is_legal(self) -> None:
        """The events of a job are moves that its states allow, and the last one is where it stands."""
        with reading(self.engine) as db:
            events = db.execute(text("select prediction_id, type from events order by seq")).all()
        here: dict[str, Status] = {}
        for id, type in events:
            there = Status(STATUS_AFTER.get(type, type))
            if id in here and (here[id], type) not in ((Status.CREATED, "created"), (Status.CREATED, "withdrawn")):
                check_move(here[id], there)
            here[id] = there
        assert here == {id: model.status for id, model in self.believed.jobs.items()}
        assert all(count == 1 for (_, type), count in Counter(map(tuple, events)).items() if type in TERMINAL)

    @invariant()
    def every_attempt_is_accounted_for(self) -> None:
        """Only a job that is held has an attempt without an end, and only one."""
        with reading(self.engine) as db:
            open_ones = db.execute(text("select prediction_id, attempt from attempts where ended_at is null")).all()
        assert {Lease(*row) for row in open_ones} == {m.lease for m in self.believed.jobs.values() if m.lease}

    def teardown(self) -> None:
        """Whatever happened, everything left can still be brought to an end."""
        for lease in [model.lease for model in self.believed.jobs.values() if model.lease]:
            self.store.release(lease)
        store_module.REJOIN_SECONDS = OVER
        self.store.reap(MAX_ATTEMPTS)
        store_module.REJOIN_SECONDS = USUAL
        while claimed := self.store.claim("last", 10, FRESH):
            for job in claimed:
                assert self.store.complete(job.lease, [], {})
        statuses = {self.store.get(id).status for id in self.believed.jobs}
        self.store.close()
        self.engine.dispose()
        type(self).drop(self.url)
        self.folder.cleanup()
        assert statuses <= TERMINAL


def sqlite_file(folder: str) -> str:
    """A new SQLite file with all tables."""
    url = f"sqlite:///{folder}/impasto.db"
    engine = open_database(url)
    upgrade(engine)
    engine.dispose()
    return url


class OnSqlite(JobMachine):
    """The walk over SQLite."""

    new_url = staticmethod(sqlite_file)
    drop = staticmethod(lambda url: None)


class OnPostgresql(JobMachine):
    """The same over a real PostgreSQL."""

    new_url = staticmethod(lambda folder: new_database())
    drop = staticmethod(drop_database)


TestOnSqlite = OnSqlite.TestCase
TestOnPostgresql = OnPostgresql.TestCase
TestOnSqlite.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestOnPostgresql.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)
