-- ARGV child: a child process has died; hand out its shares again. Returns the job of each.
local lost = {}
for _, member in ipairs(redis.call('ZRANGE', LEASED, 0, -1)) do
  local job, number = string.match(member, '^(.*):(%d+)$')
  local share = job and share_of(job, number)
  if share and share.child == ARGV[1] and bury(member, 1) then lost[#lost + 1] = job end
end
return lost
