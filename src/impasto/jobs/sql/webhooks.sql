-- Webhooks: events on their way to the addresses that asked for them. How these files are read stands in queries.py.

-- record_webhook --
-- A job has ended: where it names an address, an event waits for delivery from now on. Once for each job.
insert into webhooks (id, prediction_id, url, run_after, created_at)
select :webhook_id, id, webhook_url, $now, $now from predictions where id = :id and webhook_url is not null
    on conflict (prediction_id) do nothing;

-- any_webhook_due --
-- One row if some event waits to be taken; a cheap look before the claim, which writes.
select 1 from webhooks
 where delivered_at is null and given_up_at is null and run_after <= $now
   and (lease_until is null or lease_until < $now)
 limit 1;

-- claim_webhooks --
-- Up to :limit events go to one deliverer, which must settle them within :lease. Keys take turns, first tries go
-- before later ones, so that one key's dead address holds nobody up.
with due as (
    select w.id, row_number() over (partition by j.key_id order by w.attempt, w.run_after, w.id) as turn
      from webhooks w join predictions j on j.id = w.prediction_id
     where w.delivered_at is null and w.given_up_at is null and w.run_after <= $now
       and (w.lease_until is null or w.lease_until < $now)),
chosen as (
    select p.id from webhooks p join due on due.id = p.id
     where p.lease_until is null or p.lease_until < $now
     order by due.turn, p.run_after, p.id
     limit :limit $skip_locked)
update webhooks set attempt = attempt + 1, lease_until = $now + :lease
 where id in (select id from chosen)
returning id, prediction_id, url, attempt;

-- webhook_delivered --
-- The address took the event. Only the try that holds the lease may say so.
update webhooks set delivered_at = $now, lease_until = null, last_error = ''
 where id = :id and attempt = :attempt and delivered_at is null;

-- retry_webhook --
-- A try failed; the next one is due in :pause.
update webhooks set run_after = $now + :pause, lease_until = null, last_error = :error
 where id = :id and attempt = :attempt and delivered_at is null;

-- give_up_webhook --
-- The last try failed, or the address said that it wants no more.
update webhooks set given_up_at = $now, lease_until = null, last_error = :error
 where id = :id and attempt = :attempt and delivered_at is null;
