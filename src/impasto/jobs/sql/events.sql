-- What those who follow jobs are told. How these files are read stands in queries.py.

-- glances --
-- How some jobs stand, and the number of each one's last change of state.
select p.id, p.status, p.attempt, p.progress,
       (select max(e.seq) from events e where e.prediction_id = p.id) as seq
  from predictions p
 where p.id in $listed_ids and p.deleted_at is null;

-- previews --
-- What the pictures of some jobs are becoming, where there is something to see.
select id, preview from predictions where id in $listed_ids and preview is not null and deleted_at is null;
