-- ARGV lane, priority, owner: take out of a line what does not belong there, and the line's turn if it is empty. Returns what was
-- taken out.
local line, out = {lane = ARGV[1], priority = ARGV[2], owner = ARGV[3]}, {}
for _, job in ipairs(redis.call('ZRANGE', waiting(line), 0, 999)) do
  local own = redis.call('TYPE', key(job)).ok
  local j = own == 'hash' and read(job)
  local fits = j and active(j) and j.lane == line.lane and j.priority == line.priority and j.owner == line.owner
  if own == 'none' or (j and not fits) then
    leave(line, job)
    out[#out + 1] = job
  end
end
if redis.call('EXISTS', waiting(line)) == 0 then redis.call('ZREM', turns(line.lane, line.priority), line.owner) end
return out
