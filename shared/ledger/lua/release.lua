-- ARGV job, chunk, token: a worker that stops gives its chunk back; it is not counted as lost.
local job, number = ARGV[1], ARGV[2]
if redis.call('HGET', key(job, 'leases'), number) ~= ARGV[3] then return 0 end
redis.call('HDEL', key(job, 'leases'), number)
redis.call('ZREM', LEASED, job .. ':' .. number)
wait(job, number, now_ms())
return 1
