-- Jobs read for those who poll them. How these files are read stands in queries.py.

-- jobs --
-- Some jobs, whoever owns them; a deleted one is not there.
select * from predictions where id in $listed_ids and deleted_at is null;
