-- What an operator asks of a database: is it sound, and how is it going. How these files are read stands in queries.py.

-- revision --
-- The last migration that was run.
select version_num from alembic_version;

-- ended_other_than_once --
-- Every ended prediction has exactly one event that says so, and no other prediction has any.
select p.id from predictions p
 where (p.status in ('completed', 'failed', 'cancelled'))
    <> ((select count(*) from events e
          where e.prediction_id = p.id and e.type in ('completed', 'failed', 'cancelled')) = 1)
    or (select count(*) from events e
         where e.prediction_id = p.id and e.type in ('completed', 'failed', 'cancelled')) > 1
 limit :limit;

-- held_without_lease --
-- A prediction has a lease and an owner if and only if a worker has it.
select id from predictions
 where (status = 'processing') <> (lease_owner is not null and lease_until is not null)
    or (lease_owner is null) <> (lease_until is null)
 limit :limit;

-- delivered_other_than_once --
-- A completed prediction was delivered by one attempt, its last; others by none.
select p.id from predictions p
 where (select count(*) from attempts a where a.prediction_id = p.id and a.outcome = 'ok')
    <> case when p.status = 'completed' then 1 else 0 end
    or (p.status = 'completed' and not exists (
        select 1 from attempts a where a.prediction_id = p.id and a.attempt = p.attempt and a.outcome = 'ok'))
 limit :limit;

-- attempts_left_open --
-- Only a prediction that a worker has, has an attempt without an end: its last.
select a.prediction_id as id from attempts a join predictions p on p.id = a.prediction_id
 where (a.outcome is null or a.ended_at is null)
   and not (p.status = 'processing' and a.attempt = p.attempt)
 limit :limit;

-- times_out_of_order --
-- A prediction has a time of its end if and only if it has ended.
select id from predictions
 where (status in ('completed', 'failed', 'cancelled')) <> (finished_at is not null)
 limit :limit;

-- ended_untold --
-- An ended prediction that names an address has an event for it; one that was deleted may have none.
select p.id from predictions p
 where p.webhook_url is not null and p.deleted_at is null and p.status in ('completed', 'failed', 'cancelled')
   and not exists (select 1 from webhooks w where w.prediction_id = p.id)
 limit :limit;

-- ended_since --
-- How many predictions ended in the last :within, and how; with the time from a first start to the end, on average.
select status, count(*) as jobs, coalesce(avg(finished_at - coalesce(started_at, finished_at)), 0) as run,
       coalesce(avg(coalesce(started_at, finished_at) - created_at), 0) as waited
  from predictions where finished_at >= $now - :within
 group by status;

-- next_in_line --
-- The jobs that wait in a pool, those due first in front.
select id from predictions where status = 'created' and not withdrawn and pool = :pool
 order by priority desc, fair, id limit :limit;

-- pace --
-- How long lately completed predictions ran, and how many run now.
select (select avg(run) from (
            select finished_at - started_at as run from predictions
             where finished_at >= $now - :within and status = 'completed' and started_at is not null
             order by finished_at desc limit 100) as lately) as run,
       (select count(*) from predictions where status = 'processing' and pool = :pool) as running;
