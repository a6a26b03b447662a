// Starts `attnc lsp` for .attn files.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

function activate() {
  const [command, ...args] = workspace.getConfiguration("attn").get("server.command");
  client = new LanguageClient(
    "attn",
    "attn",
    { command, args },
    { documentSelector: [{ language: "attn" }] },
  );
  return client.start();
}

function deactivate() {
  return client && client.stop();
}

module.exports = { activate, deactivate };
