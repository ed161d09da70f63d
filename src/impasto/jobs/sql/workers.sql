-- What workers say of themselves, and the queue they work on. How these files are read stands in queries.py.

-- report_worker --
-- A worker is alive, and has done so much since its start.
insert into workers (id, host, device, pool, started_at, seen_at, stats)
values (:id, :host, :device, :pool, $now, $now, :stats)
on conflict (id) do update set seen_at = $now, stats = excluded.stats;

-- list_workers --
-- All that are remembered, the oldest first, with the milliseconds since each was heard.
select id, host, device, pool, started_at, stats, $now - seen_at as silent from workers order by started_at, id;

-- seen_workers --
-- Workers that were heard in the last :within milliseconds.
select count(*) from workers where seen_at >= $now - :within;

-- remove_worker --
-- A worker has ended.
delete from workers where id = :id;

-- forget_workers --
-- Those that have been silent for :silent milliseconds are not remembered any longer.
delete from workers where seen_at < $now - :silent;

-- waiting_by_pool --
-- Jobs that wait, by pool, and the milliseconds that the oldest has waited.
select pool, count(*) as jobs, $now - min(created_at) as oldest
  from predictions where status = 'created' and not withdrawn group by pool;

-- running_by_pool --
-- Jobs that workers hold, by pool.
select pool, count(*) as jobs from predictions where status = 'processing' group by pool;
