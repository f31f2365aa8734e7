-- ARGV job, seconds until an unsealed job is forgotten, field, value, ...: begin a job. Returns 0 if there is one of this name.
local job = ARGV[1]
if redis.call('EXISTS', key(job)) == 1 then return 0 end
for _, part in ipairs(PARTS) do redis.call('DEL', key(job, part)) end
redis.call('HSET', key(job), unpack(ARGV, 3))
redis.call('HSET', key(job), 'created', now_ms())
redis.call('EXPIRE', key(job), ARGV[2])
return 1
