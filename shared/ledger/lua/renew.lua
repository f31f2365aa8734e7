-- ARGV job, chunk, token, lease ms: extend a lease. Returns 'ok', 'lost' (another worker has the chunk) or 'cancelled'.
local job, number = ARGV[1], ARGV[2]
if redis.call('HGET', key(job, 'leases'), number) ~= ARGV[3] then return 'lost' end
redis.call('ZADD', LEASED, now_ms() + ARGV[4], job .. ':' .. number)
return redis.call('HEXISTS', key(job), 'cancelled') == 1 and number ~= '-1' and 'cancelled' or 'ok'
