-- ARGV job, chunk, token: give back the chunk of a stopping worker, without counting it as lost. Returns 0 if the lease was lost.
local job, number = ARGV[1], ARGV[2]
if redis.call('HGET', key(job, 'leases'), number) ~= ARGV[3] then return 0 end
redis.call('HDEL', key(job, 'leases'), number)
redis.call('ZREM', LEASED, job .. ':' .. number)
wait(job, number, now_ms())
return 1
