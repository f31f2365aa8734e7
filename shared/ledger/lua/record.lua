-- ARGV job, index, state, result: record a result, once per image, however often its chunk is delivered. Returns 1 if it is the first.
local job, index, state = ARGV[1], ARGV[2], ARGV[3]
if redis.call('EXISTS', key(job)) == 0 then return 0 end
if redis.call('HSETNX', key(job, 'results'), index, ARGV[4]) == 0 then return 0 end
local images = 1 + tonumber(redis.call('HGET', key(job, 'duplicates'), index) or 0)
redis.call('HINCRBY', key(job), state, images)
redis.call('XADD', key(job, 'events'), '*', 'i', index)
local ttl = redis.call('HGET', key(job), 'ttl')
redis.call('EXPIRE', key(job, 'results'), ttl)
redis.call('EXPIRE', key(job, 'events'), ttl)
return 1
