-- API keys: made, listed, recognised, revoked. How these files are read stands in queries.py.

-- create_key --
-- A new key; only the hash of its secret is kept.
insert into keys (id, name, prefix, secret_hash, created_at)
values (:id, :name, :prefix, :secret_hash, $now);

-- list_keys --
-- All keys, the oldest first, revoked ones too.
select id, name, prefix, created_at, disabled_at from keys order by created_at, id;

-- find_key --
-- The key whose secret has this hash.
select id, name, prefix, created_at, disabled_at from keys where secret_hash = :secret_hash;

-- any_key --
-- One row if some key can still be used.
select 1 from keys where disabled_at is null limit 1;

-- revoke_key --
-- A usable key, named by id or name, is shut off for good.
update keys set disabled_at = $now
 where (id = :name_or_id or name = :name_or_id) and disabled_at is null
returning id, name, prefix, created_at, disabled_at;
