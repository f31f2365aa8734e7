-- ARGV child: a child process has died; hand out its shares again. Returns how many they were.
local lost = 0
for _, member in ipairs(redis.call('ZRANGE', LEASED, 0, -1)) do
  local job, number = string.match(member, '^(.*):(%d+)$')
  local share = job and share_of(job, number)
  if share and share.child == ARGV[1] and bury(member, 1) then lost = lost + 1 end
end
return lost
