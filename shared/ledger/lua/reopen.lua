-- ARGV job: put an ended job with open images back in line. Returns how many images are open.
local job = ARGV[1]
local j = read(job)
if j.state ~= 'done' and j.state ~= 'failed' and j.state ~= 'cancelled' then return 0 end
local open = tonumber(redis.call('HGET', key(job), 'open'))
if open == 0 then return 0 end
redis.call('HINCRBY', key(job), 'failed', 0 - (redis.call('HGET', key(job), 'lapsed') or 0)) -- -0 is no integer
redis.call('HDEL', key(job), 'cancelled', 'expired', 'paused', 'lapsed', 'until', 'ended', 'manifest', 'manifest_tries')
redis.call('HSET', key(job), 'state', 'queued', 'order', redis.call('INCR', 'imagemill:sequence'))
redis.call('ZREM', manifests(j.lane), job)
persist(job)
enqueue(job)
return open
