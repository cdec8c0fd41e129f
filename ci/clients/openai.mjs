// OpenAI's client for Node: `openai.mjs FOLDER API CHAT EMBEDDINGS`, where FOLDER has it in `node_modules`.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, baseURL, chat, embeddings] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none" });
const messages = [{ role: "user", content: "What is the capital of France?" }];

const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert(names.includes(chat), `${names}`);

const answer = await client.chat.completions.create({ model: chat, messages });
assert.match(answer.choices[0].message.content, /Paris/);
assert(answer._request_id.startsWith("req-"));

let told = "";
const stream = await client.chat.completions.create({
  model: chat,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
let usage;
for await (const chunk of stream) {
  told += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(told, answer.choices[0].message.content);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);

const final = await client.chat.completions.stream({ model: chat, messages }).finalContent();
assert.equal(final, told);

const response = client.responses.stream({ model: chat, input: "What is the capital of France?" });
assert.match((await response.finalResponse()).output_text, /Paris/);

const { data } = await client.embeddings.create({ model: embeddings, input: ["a cat", "a dog"] });
assert.equal(data.length, 2);
assert(data.every((item) => item.embedding.length > 100 && item.embedding.every(Number.isFinite)));

const left = await client.chat.completions.create({ model: chat, messages, max_tokens: 1500, stream: true });
for await (const _ of left) break;

await assert.rejects(client.chat.completions.create({ model: "no-such", messages }), (error) => {
  assert(error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
  return true;
});
await assert.rejects(client.chat.completions.create({ model: chat, messages, temperature: "hot" }), (error) => {
  assert(error instanceof OpenAI.BadRequestError && error.param === "temperature", error);
  return true;
});
