"""Ways to reach a judge. Import the one you need: `judges.clients.openai_chat` alone imports httpx."""
