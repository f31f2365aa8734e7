-- ARGV job, share, child, kept ranges, kept images, returned ranges: return what a share has not begun.
-- Without kept ranges, the share ends. Returned images that have a result stay done: a child returns all that it doesn't keep,
-- because in a power cut or a failover Redis forgets its last writes, confirmed or not. Returns 0 if the lease was lost.
local job, number = ARGV[1], ARGV[2]
local raw = redis.call('HGET', key(job, 'shares'), number)
local share = raw and cjson.decode(raw)
if not share or share.child ~= ARGV[3] then return 0 end
local kept, returned, held = tonumber(ARGV[5]), 0, {}
for _, range in ipairs(pairs_of(share.ranges)) do
  for index = range[1], range[2] - 1 do held[index] = true end
end
count_running(share.owner, kept - share.images)
if kept == 0 then
  redis.call('HDEL', key(job, 'shares'), number)
  redis.call('ZREM', LEASED, job .. ':' .. number)
else
  share.ranges, share.images = ARGV[4], kept
  redis.call('HSET', key(job, 'shares'), number, cjson.encode(share))
end
if not active(read(job)) then return 1 end

local function put_back(first, last)
  if share.alone then
    redis.call('LPUSH', key(job, 'suspects'), first)
    redis.call('HINCRBY', key(job, 'attempts'), first, -1)
  else
    redis.call('LPUSH', key(job, 'back'), string.format('%d-%d', first, last))
    redis.call('HINCRBY', key(job), 'back', last - first)
  end
  returned = returned + last - first
end

for _, range in ipairs(pairs_of(ARGV[6])) do
  for index = range[1], range[2] - 1 do
    if held[index] and redis.call('HEXISTS', key(job, 'results'), index) == 1 then held[index] = nil end
  end
end

-- From the last to the first, so that the first is the next to be handed out. What the share no longer holds was returned
-- before: the child did not get our answer and asks again.
local ranges = pairs_of(ARGV[6])
for place = #ranges, 1, -1 do
  local last = ranges[place][2]
  while last > ranges[place][1] do
    local first = last
    while first > ranges[place][1] and held[first - 1] do first = first - 1 end
    if first < last then put_back(first, last) end
    last = math.min(first, last - 1)
  end
end
if returned > 0 and redis.call('ZSCORE', clocks(share.priority), share.owner) then
  move_clock(share.priority, share.owner, -returned)
end
if not finish_if_over(job) then enqueue(job) end
return 1
