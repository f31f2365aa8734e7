-- ARGV job, index...: forget these failures of an ended job.
local job = ARGV[1]
if not ended(read(job)) then return 0 end -- somebody else has retried it
for place = 2, #ARGV do
  local index = ARGV[place]
  if redis.call('HDEL', key(job, 'results'), index) == 1 then
    redis.call('HINCRBY', key(job), 'failed', -1 - figure(redis.call('HGET', key(job, 'duplicates'), index), 0))
    redis.call('RPUSH', key(job, 'back'), string.format('%d-%d', index, index + 1))
    redis.call('HINCRBY', key(job), 'back', 1)
    redis.call('HINCRBY', key(job), 'open', 1)
  end
end
expire(job)
return 1
