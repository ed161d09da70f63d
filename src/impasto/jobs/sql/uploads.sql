-- Files that clients send: announced, received, found again, swept. How these files are read stands in queries.py.

-- uploaded_by_key --
-- Bytes that the files of a key take; those announced a short while ago count with the size they announced.
select coalesce(sum(size), 0) from uploads
 where key_id = :key_id and (received_at is not null or created_at > $now - :ticket_life);

-- announce_upload --
-- A key says that it will send a file; the ticket's secret, of which the hash is kept, lets it do so once.
insert into uploads (id, key_id, ticket_hash, filename, size, created_at)
values (:id, :key_id, :ticket_hash, :filename, :size, $now);

-- find_ticket --
-- The announced file that a ticket's secret is for, unless it came already or the ticket is too old.
select id, key_id, filename, size from uploads
 where ticket_hash = :ticket_hash and received_at is null and created_at > $now - :ticket_life;

-- receive_upload --
-- An announced file came whole; its ticket is used up. No row: it came before.
update uploads
   set ticket_hash = null, blob = :blob, content_type = :content_type, size = :size, received_at = $now
 where id = :id and received_at is null
returning id, key_id, filename, blob, content_type, size;

-- find_upload --
-- A file that came and is not too old.
select id, key_id, filename, blob, content_type, size from uploads
 where id = :id and received_at is not null and created_at > $now - :kept;

-- find_upload_of_key --
-- The newest file of a key and a type that has this id, or one of two names.
select id, key_id, filename, blob, content_type, size from uploads
 where key_id = :key_id and content_type = :content_type and created_at > $now - :kept
   and (id = :name or filename = :name or filename = :file)
 order by created_at desc, id limit 1;

-- old_uploads --
-- Files that nobody finds any more, and announced ones that never came.
select id, blob from uploads
 where created_at < $now - :ticket_life and (received_at is null or created_at < $now - :kept)
 order by created_at limit :limit;

-- forget_upload --
-- An upload whose file is deleted.
delete from uploads where id = :id;

-- upload_blobs --
-- Every uploaded file that a row names.
select blob from uploads where blob is not null;
