-- Jobs of the past: listed, deleted by their owner, expired, swept. How these files are read stands in queries.py.

-- list_predictions --
-- One page of a key's jobs, the newest first; an empty text leaves its condition out.
-- A withdrawn job counts as failed: that is what it will be.
select * from predictions
 where key_id = :key_id and deleted_at is null and created_at >= :after and created_at < :before
   and (cast(:model as text) = '' or model = :model)
   and (cast(:status as text) = '' or case when withdrawn then 'failed' else status end in (:status, :or_status))
 order by created_at desc, id desc limit :limit offset :offset;

-- count_predictions --
-- How many jobs all pages together have.
select count(*) from predictions
 where key_id = :key_id and deleted_at is null and created_at >= :after and created_at < :before
   and (cast(:model as text) = '' or model = :model)
   and (cast(:status as text) = '' or case when withdrawn then 'failed' else status end in (:status, :or_status));

-- hide_prediction --
-- Its owner deletes a job: nobody sees it any more, and the same request makes a new one.
update predictions set deleted_at = $now, idempotency_key = null, body_hash = null, dropped_at = null
 where id = :id and key_id = :key_id and deleted_at is null
returning status, outputs, input;

-- predictions_to_purge --
-- Deleted jobs that have ended, some time after their deletion.
select id, input from predictions
 where deleted_at < $now - :grace and status in ('completed', 'failed', 'cancelled')
 order by deleted_at limit :limit;

-- purge_webhooks --
-- What was to be told of a deleted job.
delete from webhooks where prediction_id = :id;

-- purge_events --
-- What happened to a deleted job.
delete from events where prediction_id = :id;

-- purge_attempts --
-- Who worked on a deleted job.
delete from attempts where prediction_id = :id;

-- purge_prediction --
-- A deleted job whose files are gone.
delete from predictions where id = :id and deleted_at is not null;

-- predictions_to_expire --
-- Jobs that ended so long ago that their pictures are not kept any more.
select id, outputs from predictions
 where expired_at is null and finished_at < $now - :kept
 order by finished_at limit :limit;

-- predictions_to_forget --
-- Jobs that ended so long ago that nothing of them is kept, but for those whose webhook is still on its way.
select id, outputs, input from predictions
 where deleted_at is null and finished_at < $now - :kept
   and not exists (select 1 from webhooks w
                    where w.prediction_id = predictions.id and w.delivered_at is null and w.given_up_at is null)
 order by finished_at limit :limit;

-- forget_prediction --
-- A job is over for good: nobody sees it any more, and its rows go as those of a deleted one.
update predictions set deleted_at = $now, idempotency_key = null, body_hash = null, dropped_at = null
 where id = :id and deleted_at is null;

-- expire_prediction --
-- A job's pictures are deleted; the job itself stays.
update predictions set expired_at = $now where id = :id and expired_at is null;

-- attempts_to_sweep --
-- Attempts that ended without a result, some time ago, and may have left pictures behind.
select prediction_id, attempt from attempts
 where outcome <> 'ok' and swept_at is null and ended_at < $now - :grace
 order by ended_at limit :limit;

-- attempt_swept --
-- What an attempt left behind is deleted.
update attempts set swept_at = $now where prediction_id = :id and attempt = :attempt;

-- live_inputs --
-- What the jobs that wait or run were asked for.
select input from predictions where status = 'created'
union all
select input from predictions where status = 'processing';
