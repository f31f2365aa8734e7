-- ARGV job, share, child, kept ranges, kept images, returned ranges: return what a share has not begun.
-- Without kept ranges, the share ends. Returned images that have a result stay done: a child returns all that it doesn't keep,
-- because in a power cut or a failover Redis forgets its last writes, confirmed or not. Returns 0 if the lease was lost.
local job, number = ARGV[1], ARGV[2]
local share = share_of(job, number)
if not share or share.child ~= ARGV[3] then return 0 end
local kept, returned, held = tonumber(ARGV[5]), {}, {}
for _, range in ipairs(share.pairs) do
  for index = range[1], range[2] - 1 do held[index] = true end
end
count_running(share.owner, kept - share.images)
if kept == 0 then
  redis.call('HDEL', key(job, 'shares'), number)
  redis.call('ZREM', LEASED, job .. ':' .. number)
else
  share.ranges, share.images, share.pairs = ARGV[4], kept, nil
  redis.call('HSET', key(job, 'shares'), number, cjson.encode(share))
end
if not active(read(job)) then return 1 end

-- What the share no longer holds was returned before: the child did not get our answer and asks again.
for _, range in ipairs(pairs_of(ARGV[6])) do
  for index = range[1], range[2] - 1 do
    if held[index] and redis.call('HEXISTS', key(job, 'results'), index) == 0 then returned[#returned + 1] = index end
  end
end
if #returned > 0 and figure(share.deaths, 0) > 0 then
  add_group(job, 'LPUSH', share.deaths, returned)
elseif #returned > 0 then
  local ranges = pairs_of(text_of(returned))
  for place = #ranges, 1, -1 do -- so that the first is the next to be handed out
    redis.call('LPUSH', key(job, 'back'), string.format('%d-%d', ranges[place][1], ranges[place][2]))
  end
  redis.call('HINCRBY', key(job), 'back', #returned)
end
if #returned > 0 and redis.call('ZSCORE', clocks(share.priority), share.owner) then
  move_clock(share.priority, share.owner, -#returned)
end
if not finish_if_over(job) then enqueue(job) end
return 1
