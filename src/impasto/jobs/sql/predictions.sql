-- Jobs: submitted, claimed, kept, ended. How these files are read stands in queries.py.

-- find_repeat --
-- The job that an earlier submit of this key made under the same idempotency key.
select * from predictions where key_id = :key_id and idempotency_key = :idempotency_key;

-- free_idempotency_key --
-- A deleted job gives up its idempotency key, so that it can be used for another.
update predictions set idempotency_key = null where id = :id and deleted_at is not null;

-- find_dropped --
-- The job of this key with this body that its client hung up on first, less than :window ago, and that is worth
-- coming back to. (By its creation would do as well, but has SQLite walk through all jobs of the key.)
select id, withdrawn from predictions
 where key_id = :key_id and body_hash = :body_hash and dropped_at > $now - :window
   and status in ('created', 'processing', 'completed') and not cancel_requested
   and deleted_at is null and expired_at is null
 order by dropped_at, id limit 1;

-- rejoin_job --
-- A request comes to a job that is there already: it is dropped no more, a withdrawn one waits again in its old
-- place, and :held synchronous requests more hold it.
update predictions set dropped_at = null, withdrawn = false, holders = holders + :held
 where id = :id and status in ('created', 'processing', 'completed') and not cancel_requested
returning *;

-- find_held --
-- The age of the oldest job, not ended, that a synchronous request for the same body holds.
select max($now - created_at) from predictions
 where key_id = :key_id and body_hash = :body_hash and holders > 0 and status in ('created', 'processing');

-- drop_job --
-- A client hung up. With nobody else holding the job it is dropped, and, where :withdraw says so, no worker takes it
-- if none has begun it.
update predictions
   set withdrawn = withdrawn or (:withdraw and holders <= 1 and status = 'created' and started_at is null),
       dropped_at = case when holders <= 1 then $now else dropped_at end,
       holders = case when holders > 0 then holders - 1 else 0 end
 where id = :id and status in ('created', 'processing', 'completed')
returning withdrawn;

-- end_withdrawn --
-- Withdrawn jobs that nobody came back to for :window end as cancelled.
update predictions
   set status = 'cancelled', error = :error, error_class = 'cancelled', cancel_requested = true, withdrawn = false,
       finished_at = $now
 where withdrawn and status = 'created' and dropped_at <= $now - :window
returning id;

-- advance_key --
-- The fair tag of the key's next job (self-clocked fair queuing, Golestani 1994): the later of the key's own
-- last tag and the system's virtual time, plus the cost, which weighs less for a key of more weight. Virtual time is
-- the tag of the job due next, jobs of keys that may run no more left out; or, with nothing waiting, the last tag given
-- to anybody, so that work done on an idle system is never held against a key. What the key has used is noted too.
update keys set vtime = :cost / weight + $greatest(vtime, coalesce(
           (select fair from predictions where status = 'created' and not withdrawn and pool = :pool
               and key_id not in (select key_id from $places as full_keys where places <= 0)
             order by priority desc, fair, id limit 1),
           (select max(vtime) from keys))),
       rate_at = :rate_at, spent = :spent, spent_on = :spent_on, default_running = :default_running
 where id = :key_id
returning vtime;

-- create_job --
-- A new job, waiting for a worker.
insert into predictions (id, key_id, idempotency_key, model, pool, status, priority, fair, lora_key, input, seed,
                         webhook_url, body_hash, holders, created_at)
values (:id, :key_id, :idempotency_key, :model, :pool, 'created', :priority, :fair, :lora_key, :input, :seed,
        :webhook_url, :body_hash, :holders, $now)
returning *;

-- get_job --
-- One job, whoever owns it.
select * from predictions where id = :id;

-- claim_jobs --
-- Up to :limit waiting jobs go to one worker, in one statement. Of the 64 due next, those whose LoRAs are loaded
-- already go first, but only within a stretch of :bucket units of fair share, so nobody waits long for affinity. Keys
-- that may run only so many jobs get no more than that, and do not stand in the way of others. (Some conditions are said
-- in a roundabout way, so that PostgreSQL, which believes that next to nothing waits, takes the index that is in order
-- and then looks at 64 rows by their ids, not at all that wait, 64 times.)
with room as (
    select key_id, places from $places as limited),
front as (
    select id, key_id, priority, fair, lora_key from predictions
     where status = 'created' and (withdrawn or false) = false and pool = :pool
       and key_id not in (select key_id from room where places <= 0)
     order by priority desc, fair, id limit 64),
due as (
    select front.*, row_number() over (partition by front.key_id order by priority desc, fair, id) as place,
           room.places
      from front left join room on room.key_id = front.key_id),
chosen as (
    select p.id from predictions p join due on due.id = p.id
     where p.id $is_due and p.status || '' = 'created' and (p.withdrawn or false) = false
       and (due.places is null or due.place <= due.places)
     order by due.priority desc, floor((due.fair - (select min(fair) from due)) / :bucket), $missing_loras, due.fair,
              p.id
     limit :limit $skip_locked)
update predictions
   set status = 'processing', attempt = attempt + 1, lease_owner = :worker, lease_until = $now + :lease,
       started_at = coalesce(started_at, $now)
 where id in (select id from chosen)
returning *;

-- beat --
-- A worker is alive: its lease on one job is prolonged and the job's progress noted. No row: the lease is lost.
update predictions set lease_until = $now + :lease, progress = :progress
 where id = :id and attempt = :attempt and lease_owner = :worker and status = 'processing'
returning cancel_requested;

-- show_preview --
-- What a held job's pictures are becoming, as JSON.
update predictions set preview = :preview where id = :id and attempt = :attempt and status = 'processing';

-- end_job --
-- The holder of the lease ends the job, unless its owner cancelled it first.
update predictions
   set status = :status, outputs = :outputs, error = :error, error_class = :error_class, timings = :timings,
       loras = :loras, preview = null,
       lease_owner = null, lease_until = null, finished_at = $now
 where id = :id and attempt = :attempt and status = 'processing' and not cancel_requested;

-- requeue_job --
-- A held job waits again, in its old place, unless its owner cancelled it first.
update predictions set status = 'created', lease_owner = null, lease_until = null, progress = '{}', preview = null
 where id = :id and attempt = :attempt and status = 'processing' and not cancel_requested;

-- end_cancelled --
-- A held job that its owner cancelled ends so.
update predictions
   set status = 'cancelled', error = 'cancelled', error_class = 'cancelled', preview = null,
       lease_owner = null, lease_until = null, finished_at = $now
 where id = :id and attempt = :attempt and status = 'processing' and cancel_requested;

-- cancel_job --
-- The owner stops a job: a waiting one ends at once, a held one is marked for its worker to see.
update predictions
   set cancel_requested = true,
       error = case when status = 'created' then 'cancelled' else error end,
       error_class = case when status = 'created' then 'cancelled' else error_class end,
       finished_at = case when status = 'created' then $now else finished_at end,
       status = case when status = 'created' then 'cancelled' else status end
 where id = :id and key_id = :key_id and status in ('created', 'processing')
returning status;

-- expired --
-- Held jobs whose worker fell silent, and how often that has happened to each before.
select p.id, p.attempt,
       (select count(*) from attempts a where a.prediction_id = p.id and a.outcome = 'lease_lost') as lost
  from predictions p
 where p.status = 'processing' and p.lease_until < $now
 order by p.id $skip_locked;

-- count_deaths --
-- How many workers fell silent while they ran a job.
select count(*) from attempts where prediction_id = :id and outcome = 'lease_lost';

-- start_attempt --
-- A worker begins to run a job.
insert into attempts (prediction_id, attempt, worker, started_at) values (:id, :attempt, :worker, $now);

-- end_attempt --
-- How a worker's run of a job ended.
update attempts set ended_at = $now, outcome = :outcome where prediction_id = :id and attempt = :attempt;

-- outcome_of_attempt --
-- How a worker's run of a job ended, if it has.
select outcome from attempts where prediction_id = :id and attempt = :attempt;

-- record_event --
-- What happened to a job, in the transaction that made it happen.
insert into events (prediction_id, type, at) values (:id, :type, $now);

-- queue_depth --
-- Jobs waiting in a pool.
select count(*) from predictions where status = 'created' and not withdrawn and pool = :pool;

-- last_event --
-- A number that grows with every change of any job's state.
select coalesce(max(seq), 0) from events;

-- abandon --
-- A worker is known to be dead: its leases end now, so that the next reap gives its jobs to others.
update predictions set lease_until = $now - 1 where lease_owner = :worker and status = 'processing';

-- usage_of_key --
-- A key's predictions between two moments, counted by model, day (since 1970, UTC) and status.
select model, created_at / 86400000 as day, status, count(*) as number from predictions
 where key_id = :key_id and created_at between :since and :until
 group by model, created_at / 86400000, status
 order by day, model, status;
