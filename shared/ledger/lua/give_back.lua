-- ARGV job, share, child, kept ranges, kept images, returned ranges, returned images: return what a share has not begun.
-- Without kept ranges, the share ends. Returns 0 if the lease was lost.
local job, number = ARGV[1], ARGV[2]
local raw = redis.call('HGET', key(job, 'shares'), number)
local share = raw and cjson.decode(raw)
if not share or share.child ~= ARGV[3] then return 0 end
local kept, returned = tonumber(ARGV[5]), tonumber(ARGV[7])
count_running(share.owner, kept - share.images)
if kept == 0 then
  redis.call('HDEL', key(job, 'shares'), number)
  redis.call('ZREM', LEASED, job .. ':' .. number)
else
  share.ranges, share.images = ARGV[4], kept
  redis.call('HSET', key(job, 'shares'), number, cjson.encode(share))
end
if returned > 0 then
  for _, range in ipairs(pairs_of(ARGV[6])) do
    if share.alone then
      redis.call('LPUSH', key(job, 'suspects'), range[1])
      redis.call('HINCRBY', key(job, 'attempts'), range[1], -1)
    else
      redis.call('LPUSH', key(job, 'back'), string.format('%d-%d', range[1], range[2]))
      redis.call('HINCRBY', key(job), 'back', range[2] - range[1])
    end
  end
  move_clock(share.lane, share.priority, share.owner, -returned)
end
if not finish_if_over(job) then enqueue(job) end
return 1
