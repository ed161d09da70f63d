-- Limits of keys. How these files are read stands in queries.py.

-- lock_key --
-- Whatever one key adds takes turns, so that its limits hold; no row means no usable key.
select id, rate_per_minute, max_running, max_queued, daily_pictures, weight, rate_at, spent, spent_on, $now as now
  from keys where id = :key_id and disabled_at is null and (expires_at is null or expires_at > $now) $for_update;

-- note_request --
-- A locked key has sent a request that makes no job.
update keys set rate_at = :rate_at where id = :id;

-- count_waiting_of_key --
-- Jobs of this key that no worker has taken.
select count(*) from predictions where key_id = :key_id and status = 'created' and withdrawn = false;

-- count_waiting --
-- Jobs of all keys that no worker has taken, counted no further than :most.
select count(*) from (
    select 1 from predictions where status = 'created' and not withdrawn limit :most) as waiting;

-- take_turn --
-- Where some key may run only so many jobs at once, claims take turns, so that no two of them fill the same place.
select $turn from keys where coalesce(max_running, default_running) > 0 limit 1;

-- set_limits --
-- A usable key, named by id or name, has other limits from now on.
update keys
   set rate_per_minute = :rate_per_minute, max_running = :max_running, max_queued = :max_queued,
       daily_pictures = :daily_pictures, weight = :weight
 where id = :id and disabled_at is null
returning $key_columns;
