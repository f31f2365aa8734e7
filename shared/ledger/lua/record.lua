-- ARGV of each job: its name, the number of its results, then index, state and result of each. Records results, once per image.
-- Returns of each job: a digit per result, 1 if it is its image's first in a job that is not over; and whether nothing more of
-- the job should be begun. Of a damaged job that is not the only one, returns nothing.
local function record(job, from, count)
  local j = redis.call('HMGET', key(job), 'state', 'cancelled', 'paused', 'expired')
  if j[1] ~= 'running' and j[1] ~= 'queued' then return {string.rep('0', count), 1} end
  local indexes, digits, first, sums = {}, {}, {}, {}
  for place = 1, count do indexes[place] = ARGV[from + 3 * place - 3] end
  local duplicates = redis.call('HMGET', key(job, 'duplicates'), unpack(indexes))
  for place, index in ipairs(indexes) do
    local state, result = ARGV[from + 3 * place - 2], ARGV[from + 3 * place - 1]
    digits[place] = redis.call('HSETNX', key(job, 'results'), index, result)
    if digits[place] == 1 then
      first[#first + 1] = index
      sums[state] = (sums[state] or 0) + 1 + figure(duplicates[place], 0)
    end
  end
  for state, images in pairs(sums) do redis.call('HINCRBY', key(job), state, images) end
  for _, index in ipairs(first) do redis.call('XADD', key(job, 'events'), '*', 'i', index) end
  if #first > 0 and redis.call('HINCRBY', key(job), 'open', -#first) == 0 then finish_if_over(job) end
  return {table.concat(digits), (j[2] or j[3] or j[4]) and 1 or 0}
end

if 2 + 3 * ARGV[2] == #ARGV then return {record(ARGV[1], 3, ARGV[2])} end
local answers, at = {}, 1
while at <= #ARGV do
  local fine, answer = pcall(record, ARGV[at], at + 2, ARGV[at + 1])
  if not fine then damage(answer) end
  answers[#answers + 1] = fine and answer or {}
  at = at + 2 + 3 * ARGV[at + 1]
end
return answers
