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

-- webhook_secret --
-- What signs a key's webhooks, if it has been asked for before.
select webhook_secret from keys where id = :id;

-- keep_webhook_secret --
-- The first secret that was drawn for a key stays, whoever else draws one at the same time.
update keys set webhook_secret = coalesce(webhook_secret, :secret) where id = :id returning webhook_secret;

-- rotate_webhook_secret --
-- A usable key, named by id or name, signs with another secret from now on.
update keys set webhook_secret = :secret
 where (id = :name_or_id or name = :name_or_id) and disabled_at is null
returning webhook_secret;

-- find_usable_key --
-- The id of a usable key, named by id or name.
select id from keys where (id = :name_or_id or name = :name_or_id) and disabled_at is null;

-- any_key --
-- One row if some key can still be used.
select 1 from keys where disabled_at is null limit 1;

-- revoke_key --
-- A usable key, named by id or name, is shut off for good.
update keys set disabled_at = $now
 where (id = :name_or_id or name = :name_or_id) and disabled_at is null
returning id, name, prefix, created_at, disabled_at;
