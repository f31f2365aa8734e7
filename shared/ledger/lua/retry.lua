-- ARGV job, chunk, index...: forget these failures of an ended job, and let their chunk wait again. Returns the number of images.
local job, number = ARGV[1], ARGV[2]
if redis.call('GETBIT', key(job, 'finished'), number) == 0 then return 0 end -- another retry came first
local images = 0
for n = 3, #ARGV do
  if redis.call('HDEL', key(job, 'results'), ARGV[n]) == 1 then
    images = images + 1
    local counted = 1 + tonumber(redis.call('HGET', key(job, 'duplicates'), ARGV[n]) or 0)
    redis.call('HINCRBY', key(job), 'failed', -counted)
    redis.call('HDEL', key(job, 'attempts'), ARGV[n])
  end
end
redis.call('SETBIT', key(job, 'finished'), number, 0)
redis.call('HINCRBY', key(job), 'open', 1)
redis.call('HDEL', key(job, 'lost'), number, '-1')
redis.call('HDEL', key(job), 'cancelled', 'ended')
redis.call('HSET', key(job), 'state', 'queued')
wait(job, number, now_ms())
expire(job)
return images
