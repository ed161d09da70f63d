-- API keys: made, listed, recognised, revoked. How these files are read stands in queries.py.

-- create_key --
-- A new key; only the hash of its secret is kept. :lifetime is in milliseconds, or null.
insert into keys (id, name, prefix, secret_hash, created_at, expires_at, scopes,
                  rate_per_minute, max_running, max_queued, daily_pictures, weight)
values (:id, :name, :prefix, :secret_hash, $now, $now + cast(:lifetime as bigint), :scopes,
        :rate_per_minute, :max_running, :max_queued, :daily_pictures, :weight);

-- list_keys --
-- All keys, the oldest first, revoked ones too.
select $key_columns from keys order by created_at, id;

-- find_key --
-- The key whose secret has this hash.
select $key_columns from keys where secret_hash = :secret_hash;

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
-- A key that is not revoked, named by id or name.
select $key_columns from keys where (id = :name_or_id or name = :name_or_id) and disabled_at is null $for_update;

-- any_key --
-- One row if some key is not revoked.
select 1 from keys where disabled_at is null limit 1;

-- revoke_key --
-- A usable key, named by id or name, is shut off for good.
update keys set disabled_at = $now
 where (id = :name_or_id or name = :name_or_id) and disabled_at is null
returning $key_columns;
